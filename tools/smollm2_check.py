"""Comparing a transformers directory of SmolLM2 with llama.cpp on the GGUF that it was made from.

Token ids, the pre-tokenizer that llama.cpp's converter recognises, and the next token's distribution.
"""

import ctypes
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail
from pipeline.models.vocabulary import Vocabulary

# What pre-tokenizers differ in: digits, contractions, accents, scripts without spaces, emoji, spaces, special tokens.
PROBE = (
    "In 2019, 1,234 of 56789 patients (12.5%; p<0.001) didn't improve: naïve Sjögren's, β-blocker 5µg/kg.\n\n"
    "  Two  spaces,\ttab,\r\nline; 我想在医院工作 3 年 — Привет, ½ ٣ 🚀👩‍⚕️ x² and_under-score...!!\n \n\n\n   end  \n"
    "<|im_start|>user\nIs <|endoftext|> it?<|im_end|>\n<|im_start|>assistant\nYes. No. Maybe. yes no maybe"
)
QUESTION = "<|im_start|>user\nWhich organ pumps blood through the body?<|im_end|>\n<|im_start|>assistant\nThe"
MAX_KL = 0.1  # nats; llama.cpp rounds activations to 8 bits, which gives 0.01, and rows in a wrong order several nats


def llama_logits(llama: Vocabulary, ids: list[int]) -> Any:
    """llama.cpp's logits of the token after `ids`, shape (vocabulary,), float32."""
    import numpy as np

    context = llama.lib.llama_init_from_model(llama.model, llama.lib.llama_context_default_params())
    tokens = (llama.lib.llama_token * len(ids))(*ids)  # the batch only points to it
    if llama.lib.llama_decode(context, llama.lib.llama_batch_get_one(tokens, len(ids))):
        raise Fail("llama.cpp could not evaluate a prompt; free memory and try again")
    pointer = llama.lib.llama_get_logits_ith(context, -1)
    logits = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(llama.n_vocab,)).copy()
    llama.lib.llama_free(context)
    return logits


def first_difference(
    texts: Iterable[str], left: Callable[[str], list[int]], right: Callable[[str], list[int]]
) -> int | None:
    """The number of the first text that the two tokenize differently; None if there is none."""
    return next((number for number, text in enumerate(texts) if left(text) != right(text)), None)


def kl_divergence(p_logits: Any, q_logits: Any) -> float:
    """KL(p || q) in nats of the softmax of two vectors of logits."""
    from scipy.special import softmax
    from scipy.stats import entropy

    return float(entropy(*(softmax(x.astype(float)) for x in (p_logits, q_logits))))


def pubmedqa_texts(path: Path) -> list[str]:
    """Questions, abstracts and conclusions of a PubMedQA file such as ori_pqal.json."""
    try:
        records: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [
            "\n".join([record["QUESTION"], *record["CONTEXTS"], record["LONG_ANSWER"]]) for record in records.values()
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise Fail(f"{path} is no file of PubMedQA; name its ori_pqal.json, or leave --texts out") from None


def check_tokenizer(directory: Path, tokenize: Callable[[str], list[int]], texts: list[str]) -> Any:
    """The directory's tokenizer; raises `Fail` unless its ids are llama.cpp's and the converter knows it."""
    from conversion.base import TextModel
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=True)

    if (number := first_difference(texts, encode, tokenize)) is not None:
        raise Fail(f"text {number}: the tokenizer's ids are not llama.cpp's; install the versions in constraints.txt")
    try:
        recognised = TextModel.get_vocab_base_pre(None, tokenizer)  # pyright: ignore[reportArgumentType]
    except NotImplementedError:
        recognised = "unknown"
    if recognised != "smollm":
        raise Fail(
            f"llama.cpp's converter takes the pre-tokenizer for {recognised}, not smollm; install the versions in "
            "constraints.txt"
        )
    return tokenizer


def check_weights(directory: Path, tokenizer: Any, logits: Callable[[list[int]], Any]) -> float:
    """KL(llama.cpp || transformers) of the token after a question, in nats; raises `Fail` if it is large."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    ids = tokenizer.encode(QUESTION)
    with torch.inference_mode():
        ours = model(torch.tensor([ids])).logits[0, -1].numpy()
    divergence = kl_divergence(logits(ids), ours)
    if not divergence < MAX_KL:
        raise Fail(
            f"the weights do not give llama.cpp's probabilities (KL divergence {divergence:.2f}); install the versions "
            "in constraints.txt"
        )
    return divergence


def check(directory: Path, gguf: Path, texts: list[str]) -> float:
    """Compare the directory with llama.cpp on the GGUF; returns the KL divergence of a next token."""
    with Vocabulary(gguf, "run `make setup` again", n_gpu_layers=0) as llama:
        tokenizer = check_tokenizer(directory, llama.tokenize, [PROBE, *texts])
        return check_weights(directory, tokenizer, partial(llama_logits, llama))
