"""Generate: base and tuned model and the test questions -> the whole answers that they write, greedily.

Both models are GGUFs quantized in the same way, asked under the protocol `chat`. Off (`generate.enabled: false`), it
writes an empty file. `baseline` makes the same GGUF of the base: both make it and throw it away, because as an output
of a stage it would be cached and pushed, 4.9 GB for a Llama-3-8B.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.core.outputs import scratch, write_json
from pipeline.core.params import load_params
from pipeline.core.question import Question
from pipeline.core.resume import run_key
from pipeline.core.rows import write_rows
from pipeline.core.usage import Usage
from pipeline.models.base_weights import weights_directory
from pipeline.models.gguf import build
from pipeline.models.manifest import read_manifest
from pipeline.scoring.answers import Answer, ModelName
from pipeline.scoring.journal import journal
from pipeline.scoring.predict import EXTRAS
from pipeline.scoring.protocols import chat
from pipeline.scoring.scorer import Scorer, TooLong
from pipeline.sections.generate import Generate
from pipeline.sections.quantize import Quantize, texts

Asked = tuple[ModelName, Question]


def parse_line(line: bytes, asked: Asked) -> Answer:
    """The answer in a line of the journal; raises ValueError unless it is one to what was asked."""
    row = Answer.model_validate_json(line)
    if (row.model, row.pmid) != (asked[0], asked[1].pmid):
        raise ValueError("it answers another question")
    return row


def write_answer(scorer: Scorer, model: ModelName, pmid: str, prompt: list[int], max_new_tokens: int) -> Answer:
    """The greedy answer after the prompt's tokens."""
    _, first = scorer.score(prompt, {})
    tokens = list(scorer.continuation(first, len(prompt), max_new_tokens))
    ended = scorer.ends(tokens[-1])
    written = tokens[:-1] if ended else tokens
    text = b"".join(map(scorer.piece, written)).decode(errors="replace").strip()
    return Answer(model=model, pmid=pmid, text=text, tokens=len(written), ended=ended)


def write_answers(
    gguf: Path, model: ModelName, questions: list[Question], params: Generate, keep: Callable[[Answer], None]
) -> None:
    """Keep an answer of `gguf` to each question; refuses a prompt without room before the first answer."""
    remedy = f"lower generate.n_ctx in params.yaml, set N_GPU_LAYERS lower, or run `dvc checkout {gguf}`"
    with Scorer(gguf, params.n_ctx, remedy) as scorer:
        prompts = {row.pmid: scorer.tokenize(scorer.template.prompt(chat(row))) for row in questions}
        longest = max(prompts, key=lambda pmid: len(prompts[pmid]))
        try:
            scorer.check_room(len(prompts[longest]) + params.max_new_tokens - 1)
        except TooLong as error:
            raise Fail(
                f"PMID {longest}: {error}; raise generate.n_ctx in params.yaml to {error.tokens} or more, then run "
                "`dvc repro`"
            ) from None
        for pmid, prompt in tqdm(prompts.items(), f"answers of the {model} model"):
            try:
                keep(write_answer(scorer, model, pmid, prompt, params.max_new_tokens))
            except Fail as error:
                raise Fail(f"PMID {pmid}: {error}") from None


def main(base: Path, train: Path, gguf: Path, test: Path, answers: Path, resources: Path) -> None:
    """Write ANSWERS of the tuned model, GGUF, and of the untuned model in BASE to the questions in TEST.

    The base's importance matrix is over questions of TRAIN, as in `baseline`.
    """
    usage = Usage()
    params = load_params("generate", Generate)
    # Only the first of the types, as in `baseline`.
    quant_type = load_params("quantize", Quantize).quant_types[0]
    count = load_params("quantize", Quantize).imatrix_questions
    speed: dict[str, float] = {}
    with scratch(base.parent / "base.gguf") as base_gguf:  # removes what a killed run left, even if not enabled
        if not params.enabled:
            write_rows(answers, [])
        else:
            directory, questions = weights_directory(base), read_rows(test, Question)
            asked: list[Asked] = [(model, row) for model in ("tuned", "base") for row in questions]
            inputs = [gguf, test, train, *sorted(base.iterdir())]
            about = {"quant_type": quant_type, "imatrix_questions": count, **params.model_dump()}
            key = run_key(about, inputs, EXTRAS, os.environ.get("N_GPU_LAYERS", ""))
            with journal(key, asked, parse_line, Answer.model_dump_json) as (rows, keep):
                resumed, start = len(rows), time.perf_counter()
                if of_tuned := [row for model, row in asked[resumed:] if model == "tuned"]:
                    write_answers(gguf, "tuned", of_tuned, params, keep)
                if of_base := [row for model, row in asked[resumed:] if model == "base"]:
                    tokens = texts(count, read_rows(train, Example))
                    build(directory, read_manifest(base), {base_gguf: quant_type}, {}, tokens)
                    write_answers(base_gguf, "base", of_base, params, keep)
                seconds = time.perf_counter() - start
                write_rows(answers, rows)
                speed["tokens_per_second"] = round(sum(row.tokens for row in rows[resumed:]) / seconds, 1)
    write_json(resources, {**usage.figures(), **speed})
