"""Evaluate: the GGUF that ships and the test questions -> a prediction for each, and their scores.

P(label | prompt) by summed log-probability, as lm-evaluation-harness scores PubMedQA, but from llama.cpp's kernels and
in the model's chat template; a greedy answer is the second opinion. Measures are PubMedQA's own, accuracy and macro-F1
over all and only the test PMIDs (https://github.com/pubmedqa/pubmedqa, evaluation.py).
"""

import time
from pathlib import Path
from typing import Annotated, Any

# Before numpy: where the compiler's libstdc++ is newer than the system's, llama.cpp crashed in loading a file with CUDA
# after numpy had brought the system's in, and never in this order.
import llama_cpp  # noqa: F401  # pyright: ignore[reportUnusedImport]
from pydantic import Field
from tqdm import tqdm

from pipeline.measures import COLUMNS, summary
from pipeline.records import read_jsonl, write_csv, write_json
from pipeline.scoring import Scorer
from pipeline.stage import Fail, Section, Usage, run


class Params(Section):
    n_ctx: Annotated[int, Field(ge=64)]  # tokens: room for the longest prompt
    max_new_tokens: Annotated[int, Field(ge=1, le=64)]  # of the greedy answer


def predict(gguf: Path, test: Path, params: Params) -> tuple[list[list[Any]], dict[str, float]]:
    """A row of COLUMNS for each question, and load time, speed and size, from the questions of `test` on `gguf`."""
    questions = read_jsonl(test)
    start = time.perf_counter()
    rows: list[list[Any]] = []
    with Scorer(gguf, params.n_ctx) as scorer:
        loaded = time.perf_counter()
        tokens = 0
        for row in tqdm(questions, desc=f"questions to {gguf.name.strip('.')}"):
            try:
                scores, first, count = scorer.score(row["prompt"])
                greedy = scorer.greedy(first, count, params.max_new_tokens)
            except Fail as error:
                raise Fail(f"{test}, PMID {row['pmid']}: {error}") from None
            prediction = max(scores, key=lambda label: scores[label])
            rows.append([row["pmid"], row["label"], *(f"{p:.6f}" for p in scores.values()), prediction, greedy])
            tokens += count
    seconds = time.perf_counter() - loaded
    return rows, {
        "load_seconds": round(loaded - start, 2),
        "questions_per_second": round(len(rows) / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def main(gguf: Path, test: Path, predictions: Path, metrics: Path, resources: Path) -> None:
    """Write PREDICTIONS (PMID, gold label, three log-probabilities, prediction, greedy answer; no text) and METRICS."""
    usage = Usage()
    rows, speed = predict(gguf, test, Params.load("evaluate"))
    write_csv(predictions, COLUMNS, rows)
    write_json(metrics, {**summary(predictions), "gguf_bytes": gguf.stat().st_size})
    write_json(resources, {**usage.figures(), **speed})


if __name__ == "__main__":
    run(main)
