"""A GGUF and the test questions -> a prediction for each, by protocol: what every measured model goes through."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

# Before numpy: where the compiler's libstdc++ is newer than the system's, llama.cpp crashed in loading a file with CUDA
# after numpy had brought the system's in, and never in this order.
import llama_cpp  # noqa: F401  # pyright: ignore[reportUnusedImport]
from pydantic import AfterValidator, Field
from tqdm import tqdm

from pipeline.prompt import PROTOCOLS
from pipeline.records import read_jsonl
from pipeline.scoring import Choices, Scorer
from pipeline.stage import Fail, Section


def with_chat(protocols: list[str]) -> list[str]:
    """Refuse a list without `chat` or with a name twice: every comparison needs the one, DVC the other."""
    if "chat" not in protocols or len(set(protocols)) < len(protocols):
        raise ValueError("name chat, and every protocol once")
    return protocols


class Params(Section):
    protocols: Annotated[list[Literal["chat", "lm_eval", "question_only"]], AfterValidator(with_chat)]
    n_ctx: Annotated[int, Field(ge=64)]  # tokens: room for the longest prompt
    max_new_tokens: Annotated[int, Field(ge=1, le=64)]  # of the greedy answer


def pose(scorer: Scorer, row: dict[str, Any], protocol: str) -> tuple[list[int], Choices]:
    """Token ids of a test row's prompt under a protocol, and of the labels' forms."""
    match protocol:
        case "lm_eval":
            return scorer.plain(row["lm_eval"])
        case "question_only":
            return scorer.chat(row["question_only"])
        case _:
            return scorer.chat(row["prompt"])


def predict(gguf: Path, test: Path, params: Params) -> tuple[list[list[Any]], dict[str, float]]:
    """A row of measures.COLUMNS for each protocol and question of `test`, asked of `gguf`; load time and speed."""
    questions = read_jsonl(test)
    start = time.perf_counter()
    rows: list[list[Any]] = []
    with Scorer(gguf, params.n_ctx) as scorer:
        loaded = time.perf_counter()
        tokens = 0
        asked = [(protocol, row) for protocol in PROTOCOLS if protocol in params.protocols for row in questions]
        for protocol, row in tqdm(asked, desc=f"questions to {gguf.name.strip('.')}"):
            try:
                prompt, choices = pose(scorer, row, protocol)
                scores, first = scorer.score(prompt, choices)
                greedy = scorer.greedy(first, len(prompt), params.max_new_tokens) if protocol == "chat" else ""
            except Fail as error:
                raise Fail(f"{test}, PMID {row['pmid']}: {error}") from None
            prediction = max(scores, key=lambda label: scores[label])
            numbers = [f"{p:.6f}" for p in scores.values()]
            rows.append([protocol, row["pmid"], row["label"], *numbers, prediction, greedy, int(first.argmax())])
            tokens += len(prompt)
    seconds = time.perf_counter() - loaded
    return rows, {
        "load_seconds": round(loaded - start, 2),
        "questions_per_second": round(len(rows) / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
    }
