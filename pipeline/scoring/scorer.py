"""A GGUF and a prompt -> log-probabilities of yes, no and maybe, and a greedy answer, with llama.cpp.

One llama_decode scores a question: the prompt's tokens belong to every sequence of a unified cache, and each form of
a label follows in a sequence of its own. A form of one token costs nothing beyond the prompt.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import Fail
from pipeline.core.labels import LABELS, Label
from pipeline.core.question import Message
from pipeline.models.vocabulary import Vocabulary
from pipeline.scoring.predictions import UNPARSABLE
from pipeline.scoring.protocols import Protocol
from pipeline.sections.evaluate import CacheType

N_UBATCH = 512  # changes log-probabilities of a quantized file by up to 0.1: fixed, and recorded in the metrics
MAX_FORMS = 6  # of all labels together
MAX_TAILS = 64  # tokens of all forms after their first

Floats = NDArray[np.float64]
Choices = dict[Label, list[list[int]]]  # label -> the token ids of each of its forms


class TooLong(Fail):
    """A prompt and its answers need more tokens than the context has; `tokens` says how many."""

    def __init__(self, tokens: int, n_ctx: int) -> None:
        super().__init__(f"prompt and answer take {tokens} tokens, and the context has {n_ctx}")
        self.tokens = tokens


def parse_decision(text: str, finished: bool) -> str | None:
    """The label that an answer begins with as a whole word; None if there is none, or not yet a whole word.

    A hyphen continues a word: 'No-one' is not 'no'.
    """
    end = r"(?![\w-])" if finished else r"(?=[^\w-])"
    found = re.match(rf"\W*({'|'.join(LABELS)}){end}", text, re.IGNORECASE)
    return found[1].lower() if found else None


def number(name: str, default: int) -> int:
    """The whole number in an environment variable; raises `Fail` if it is not one."""
    value = os.environ.get(name, str(default))
    if not value.isascii() or not value.isdecimal() or int(value) >= 2**31:
        raise Fail(f"the environment variable {name} must be a whole number; set it to one, or unset it")
    return int(value)


class Scorer(Vocabulary):
    """A loaded GGUF. Use it as a context manager: it holds native memory.

    N_GPU_LAYERS and N_THREADS in the environment say where it runs: no parameters, as they change no decision.
    """

    def __init__(self, gguf: Path, n_ctx: int, remedy: str, cache_type: CacheType = "f16") -> None:
        """Load `gguf` with a context of `n_ctx` tokens, its keys and values of `cache_type`.

        `remedy` is what to do when memory is short. Raises `Fail`.
        """
        super().__init__(gguf, remedy, n_gpu_layers=number("N_GPU_LAYERS", 999))
        self.n_ctx, self.cache_type = n_ctx, cache_type
        self.context: Any = self.lib.llama_init_from_model(self.model, self.context_params())
        if not self.context:
            raise Fail(f"{gguf}: llama.cpp found no memory for a context of {n_ctx} tokens; {remedy}")

    def context_params(self) -> Any:
        """llama.cpp's parameters of the context."""
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = self.n_ctx
        params.n_ubatch = N_UBATCH
        params.n_seq_max = 1 + MAX_FORMS
        params.kv_unified = True
        # Logits over 128,256 tokens take half a megabyte a position: room for those that are read, not for all.
        params.n_outputs_max = 1 + MAX_TAILS
        params.flash_attn_type = 0
        if self.cache_type == "q8_0":  # llama.cpp has quantized values in flash attention only
            params.flash_attn_type = 1
            params.type_k = params.type_v = self.lib.GGML_TYPE_Q8_0
        params.n_threads = params.n_threads_batch = number("N_THREADS", len(os.sched_getaffinity(0)))
        return params

    def __exit__(self, *error: object) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        super().__exit__(*error)

    def encode(self, prompt: list[Message] | str, protocol: Protocol) -> tuple[list[int], Choices]:
        """Token ids of chat messages or plain text, and of each label's forms after it.

        A form is tokenized together with the prompt, and what is longer than the prompt is the form: some tokenizers
        give another id to a word at the beginning of a text. lm-evaluation-harness does the same (lm_eval/api/model.py,
        `_encode_pair`). Plain text gets BOS where the vocabulary asks for it; a chat template writes its own.
        """
        plain = isinstance(prompt, str)
        text = prompt if plain else self.template.prompt(prompt)
        tokens = self.tokenize(text, add_special=plain)
        choices: Choices = {}
        for label in LABELS:
            together = [self.tokenize(text + form, add_special=plain) for form in protocol.forms(label)]
            if not all(ids[: len(tokens)] == tokens and len(ids) > len(tokens) for ids in together):
                raise Fail(f"the tokenizer joins {label!r} with the end of the prompt; choose another base")
            choices[label] = [ids[len(tokens) :] for ids in together]
        return tokens, choices

    def decode(self, tokens: list[int], tails: list[list[int]], start: int) -> None:
        """Feed `tokens` from position `start`; each tail's tokens but the last follow in a sequence of their own."""
        shared, after = range(1 + len(tails)), start + len(tokens)
        fed: list[tuple[int, int, Sequence[int], bool]] = []  # token, position, sequences, whether logits are computed
        fed += [(token, start + i, shared, i == len(tokens) - 1) for i, token in enumerate(tokens)]
        for sequence, tail in enumerate(tails, 1):
            fed += [(token, after + i, [sequence], True) for i, token in enumerate(tail[:-1])]
        batch = self.lib.llama_batch_init(len(fed), 0, len(shared))
        try:
            batch.n_tokens = len(fed)
            for index, (token, position, sequences, logits) in enumerate(fed):
                batch.token[index], batch.pos[index], batch.logits[index] = token, position, logits
                batch.n_seq_id[index] = len(sequences)
                for i, sequence in enumerate(sequences):
                    batch.seq_id[index][i] = sequence
            if status := self.lib.llama_decode(self.context, batch):
                raise Fail(
                    f"llama.cpp could not evaluate {len(fed)} tokens (llama_decode returned {status}); "
                    "set N_GPU_LAYERS lower, or free memory"
                )
        finally:
            self.lib.llama_batch_free(batch)

    def check_room(self, tokens: int) -> None:
        """Raise `TooLong` unless the context holds `tokens`."""
        if tokens > self.n_ctx:
            raise TooLong(tokens, self.n_ctx)

    def logits(self, index: int) -> Floats:
        """The next token's logits, shape (n_vocab,), at a batch index (-1: the last); raises `Fail`."""
        pointer = self.lib.llama_get_logits_ith(self.context, index)
        logits = np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).astype(np.float64)
        if not np.isfinite(logits).all():
            raise Fail(
                "the model's logits are not finite; train with a lower train.learning_rate, or run `dvc checkout`"
            )
        return logits

    def log_probabilities(self, index: int) -> Floats:
        """Natural-log probabilities of the next token, shape (n_vocab,), at a batch index."""
        logits = self.logits(index)
        shifted = logits - logits.max()
        return shifted - np.log(np.exp(shifted).sum())

    def score(self, tokens: list[int], choices: Choices) -> tuple[dict[Label, float], Floats]:
        """Log-probability of each label right after `tokens`, summed over its forms.

        Also returns the next token's log-probabilities, shape (n_vocab,), for `greedy`.
        """
        # A form of one token is read off the prompt's last logits; only longer ones need a sequence.
        tails = [form for forms in choices.values() for form in forms if len(form) > 1]
        self.check_room(len(tokens) + sum(len(tail) - 1 for tail in tails))
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.decode(tokens, tails, 0)
        first = self.log_probabilities(len(tokens) - 1)
        index = len(tokens)
        scores: dict[Label, float] = {}
        for label, forms in choices.items():
            totals: list[float] = []
            for form in forms:
                total = float(first[form[0]])
                for token in form[1:]:
                    total += float(self.log_probabilities(index)[token])
                    index += 1
                totals.append(total)
            scores[label] = float(np.logaddexp.reduce(totals))
        return scores, first

    def continuation(self, first: Floats, position: int, max_new_tokens: int) -> Iterator[int]:
        """The greedy tokens after a prompt of `position` tokens; the last one may be an end of generation.

        `first` are the first token's logits or log-probabilities. Raises `Fail`.
        """
        self.check_room(position + max_new_tokens - 1)
        for count in range(max_new_tokens):
            token = int((self.logits(0) if count else first).argmax())
            yield token
            if self.ends(token) or count == max_new_tokens - 1:
                return
            self.decode([token], [], position + count)

    def greedy(self, first: Floats, position: int, max_new_tokens: int) -> str:
        """The decision of the greedy answer after `score`, or UNPARSABLE; stops as soon as the decision is a word."""
        text = b""
        for token in self.continuation(first, position, max_new_tokens):
            if self.ends(token):
                break
            text += self.piece(token)
            if decision := parse_decision(text.decode(errors="replace"), finished=False):
                return decision
        return parse_decision(text.decode(errors="replace"), finished=True) or UNPARSABLE


def decide(scores: dict[Label, float]) -> Label:
    """The label with the highest log-probability."""
    return max(scores, key=lambda label: scores[label])
