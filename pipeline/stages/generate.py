"""Generate: base and tuned model and the test questions -> the whole answers that they write, greedily.

Both models are GGUFs quantized in the same way, asked under the protocol `chat`. Off (`generate.enabled: false`), it
writes an empty file. `baseline` makes the same GGUF of the base: both make it and throw it away, because as an output
of a stage it would be cached and pushed, 4.9 GB for a Llama-3-8B.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

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
from pipeline.scoring.predict import EXTRAS, named_errors
from pipeline.scoring.protocols import chat
from pipeline.scoring.scorer import Scorer
from pipeline.sections.evaluate import CacheType, Evaluate
from pipeline.sections.generate import Generate
from pipeline.sections.quantize import Quantize, texts

Asked = tuple[ModelName, Question]


def parse_line(line: bytes, asked: Asked) -> Answer:
    """The answer in a line of the journal; raises ValueError unless it is one to what was asked."""
    row = Answer.model_validate_json(line)
    if (row.model, row.pmid) != (asked[0], asked[1].pmid):
        raise ValueError("it answers another question")
    return row


def write_answers(
    gguf: Path, model: ModelName, questions: list[Question], params: Generate, cache_type: CacheType
) -> Iterator[Answer]:
    """The greedy answer of `gguf` to each question; raises `Fail`."""
    remedy = f"lower generate.n_ctx in params.yaml, set N_GPU_LAYERS lower, or run `dvc checkout {gguf}`"
    with Scorer(gguf, params.n_ctx, remedy, cache_type) as scorer:
        for row in tqdm(questions, f"answers of the {model} model"):
            with named_errors(f"PMID {row.pmid}", "generate"):
                prompt = scorer.tokenize(scorer.template.prompt(chat(row)))
                _, first = scorer.score(prompt, {})
                tokens = list(scorer.continuation(first, len(prompt), params.max_new_tokens))
            ended = scorer.ends(tokens[-1])
            written = tokens[:-1] if ended else tokens
            text = b"".join(map(scorer.piece, written)).decode(errors="replace").strip()
            yield Answer(model=model, pmid=row.pmid, text=text, tokens=len(written), ended=ended)


def main(base: Path, train: Path, gguf: Path, test: Path, answers: Path, resources: Path) -> None:
    """Write ANSWERS of the tuned model, GGUF, and of the untuned model in BASE to the questions in TEST.

    The base's importance matrix is over questions of TRAIN, as in `baseline`.
    """
    usage = Usage()
    params = load_params("generate", Generate)
    # Only the first of the types, as in `baseline`.
    quant_type = load_params("quantize", Quantize).quant_types[0]
    count = load_params("quantize", Quantize).imatrix_questions
    cache_type = load_params("evaluate", Evaluate).cache_type
    speed: dict[str, float] = {}
    with scratch(base.parent / "base.gguf") as base_gguf:  # removes what a killed run left, even if not enabled
        if not params.enabled:
            write_rows(answers, [])
        else:
            directory, questions = weights_directory(base), read_rows(test, Question)
            models: dict[ModelName, Path] = {"tuned": gguf, "base": base_gguf}
            asked: list[Asked] = [(model, row) for model in models for row in questions]
            inputs = [gguf, test, train, *sorted(base.iterdir())]
            about = {"quant_type": quant_type, "imatrix_questions": count, "cache_type": cache_type}
            key = run_key(about | params.model_dump(), inputs, EXTRAS, os.environ.get("N_GPU_LAYERS", ""))
            with journal(key, asked, parse_line, Answer.model_dump_json) as (rows, keep):
                resumed, start = len(rows), time.perf_counter()
                for model, path in models.items():
                    left = [row for name, row in asked[resumed:] if name == model]
                    if left and model == "base":
                        tokens = texts(count, read_rows(train, Example))
                        build(directory, read_manifest(base), {base_gguf: quant_type}, {}, tokens)
                    if left:
                        for answer in write_answers(path, model, left, params, cache_type):
                            keep(answer)
                seconds = time.perf_counter() - start
                write_rows(answers, rows)
                speed["tokens_per_second"] = round(sum(row.tokens for row in rows[resumed:]) / seconds, 1)
    write_json(resources, {**usage.figures(), **speed})
