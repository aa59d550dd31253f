"""A GGUF and the test questions -> a prediction for each, by protocol: what every measured model goes through."""

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from tqdm import tqdm

from pipeline.core.records import CHECKPOINTS, read_examples, run_key, write_csv
from pipeline.core.stage import Fail, Section
from pipeline.scoring.measures import COLUMNS, parse
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.scoring.scorer import Choices, Scorer

Asked = list[tuple[str, dict[str, Any]]]  # protocol and test row of each question, in the order of asking


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


def whole_rows(data: bytes, asked: Asked) -> tuple[list[list[Any]], int]:
    """The rows at a journal's beginning that answer the questions `asked`, in their order, and the bytes they take."""
    rows: list[list[Any]] = []
    end = 0
    for line, (protocol, question) in zip(data.splitlines(keepends=True), asked, strict=False):
        try:
            row: Any = json.loads(line)
            found, answer = parse([str(value) for value in row])
        except (ValueError, TypeError):  # cut by a kill, or zeros that a lost machine's disk had for it
            break
        if (found, answer.pmid, answer.label) != (protocol, question["pmid"], question["label"]) or line[-1:] != b"\n":
            break
        rows.append(row)
        end += len(line)
    return rows, end


@contextmanager
def journal(
    params: Params, inputs: list[Path], asked: Asked
) -> Generator[tuple[list[list[Any]], Callable[[list[Any]], None]]]:
    """The rows that a killed run of the very same questions had written, and what adds one; removed if nothing raises.

    A question takes a second or more on a laptop, so a run may take hours.
    """
    path = CHECKPOINTS / f"{run_key(params, inputs, os.environ.get('N_GPU_LAYERS', ''))}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        rows, end = whole_rows(file.read(), asked)
        file.truncate(end)

        def keep(row: list[Any]) -> None:
            rows.append(row)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        try:
            yield rows, keep
        except BaseException:
            if not rows:
                forget(path)
            raise
        forget(path)


def forget(path: Path) -> None:
    """Remove a journal, and the directory that it lies in if that is empty: train's checkpoints may lie there."""
    path.unlink()
    with suppress(OSError):
        CHECKPOINTS.rmdir()


def predict(gguf: Path, test: Path, params: Params, predictions: Path) -> dict[str, float]:
    """Write a row of measures.COLUMNS to PREDICTIONS for each protocol and question of `test`, asked of `gguf`.

    Returns load time and speed. The journal goes only when the table is there.
    """
    questions = read_examples(test, test=True)
    asked = [(protocol, row) for protocol in PROTOCOLS if protocol in params.protocols for row in questions]
    start = time.perf_counter()
    with Scorer(gguf, params.n_ctx) as scorer, journal(params, [gguf, test], asked) as (rows, keep):
        loaded = time.perf_counter()
        resumed, tokens = len(rows), 0
        bar = tqdm(asked[resumed:], f"questions to {gguf.name.strip('.')}", total=len(asked), initial=resumed)
        for protocol, row in bar:
            try:
                prompt, choices = pose(scorer, row, protocol)
                scores, first = scorer.score(prompt, choices)
                greedy = scorer.greedy(first, len(prompt), params.max_new_tokens) if protocol == "chat" else ""
            except Fail as error:
                raise Fail(f"{test}, PMID {row['pmid']}: {error}") from None
            prediction = max(scores, key=lambda label: scores[label])
            numbers = [f"{p:.6f}" for p in scores.values()]
            keep([protocol, row["pmid"], row["label"], *numbers, prediction, greedy, int(first.argmax())])
            tokens += len(prompt)
        seconds = time.perf_counter() - loaded
        write_csv(predictions, COLUMNS, rows)
    return {
        "load_seconds": round(loaded - start, 2),
        "questions_per_second": round((len(rows) - resumed) / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
    }
