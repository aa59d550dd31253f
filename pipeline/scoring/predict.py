"""A GGUF and the test questions -> a prediction for each, by protocol: what every measured model goes through."""

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipeline.core.errors import Fail
from pipeline.core.files import read_rows
from pipeline.core.labels import LABELS
from pipeline.core.question import Question
from pipeline.core.resume import CHECKPOINTS, run_key
from pipeline.scoring.predictions import Prediction, parse, write_predictions
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.scoring.scorer import Scorer, TooLong, decide
from pipeline.sections.evaluate import ProtocolName

EXTRAS = ["evaluate", "quantize"]  # of pyproject.toml: the packages that can change a prediction


class Settings(NamedTuple):
    """How a GGUF is asked, by a section of params.yaml."""

    section: str
    protocols: list[ProtocolName]
    n_ctx: int  # tokens
    max_new_tokens: int  # of the greedy answer


Asked = list[tuple[ProtocolName, Question]]  # in the order of asking


def whole_rows(data: bytes, asked: Asked) -> tuple[list[Prediction], int]:
    """The predictions at a journal's beginning that answer `asked`, in its order, and the bytes that they take."""
    rows: list[Prediction] = []
    end = 0
    for line, (protocol, question) in zip(data.splitlines(keepends=True), asked, strict=False):
        try:
            row = parse([str(value) for value in json.loads(line)])
        except (ValueError, TypeError):  # truncated by a kill, or zeros after a crash of the machine
            break
        if (row.protocol, row.pmid, row.label) != (protocol, question.pmid, question.label) or line[-1:] != b"\n":
            break
        rows.append(row)
        end += len(line)
    return rows, end


@contextmanager
def journal(
    settings: Settings, inputs: list[Path], asked: Asked
) -> Generator[tuple[list[Prediction], Callable[[Prediction], None]]]:
    """The predictions that a killed run had written, and a function that adds one; removed if nothing is raised.

    A question takes a second or more on a laptop, so a run may take hours.
    """
    path = CHECKPOINTS / f"{run_key(settings._asdict(), inputs, EXTRAS, os.environ.get('N_GPU_LAYERS', ''))}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        rows, end = whole_rows(file.read(), asked)
        file.truncate(end)

        def keep(row: Prediction) -> None:
            rows.append(row)
            file.write(json.dumps(row.row()).encode() + b"\n")
            file.flush()

        try:
            yield rows, keep
        except BaseException:
            if not rows:
                forget(path)
            raise
        forget(path)


def forget(path: Path) -> None:
    """Remove a journal, and its directory if that is empty: train's checkpoints may be there too."""
    path.unlink()
    with suppress(OSError):
        CHECKPOINTS.rmdir()


def predict_one(scorer: Scorer, name: ProtocolName, question: Question, max_new_tokens: int) -> tuple[Prediction, int]:
    """The prediction for one question under one protocol, and the number of the prompt's tokens."""
    protocol = PROTOCOLS[name]
    tokens, choices = scorer.encode(protocol.prompt(question), protocol)
    scores, first = scorer.score(tokens, choices)
    greedy = scorer.greedy(first, len(tokens), max_new_tokens) if protocol.greedy else ""
    yes, no, maybe = (scores[label] for label in LABELS)
    top = int(first.argmax())
    return Prediction(name, question.pmid, question.label, (yes, no, maybe), decide(scores), greedy, top), len(tokens)


def predict(gguf: Path, test: Path, settings: Settings, predictions: Path) -> dict[str, float]:
    """Write a prediction to PREDICTIONS for each protocol and question of `test`, asked of `gguf`.

    Returns load time and speed. The journal is removed only when the table is written.
    """
    questions = read_rows(test, Question)
    asked: Asked = [(name, row) for name in PROTOCOLS if name in settings.protocols for row in questions]
    start = time.perf_counter()
    remedy = f"lower {settings.section}.n_ctx in params.yaml, set N_GPU_LAYERS lower, or run `dvc checkout {gguf}`"
    with Scorer(gguf, settings.n_ctx, remedy) as scorer, journal(settings, [gguf, test], asked) as (rows, keep):
        loaded = time.perf_counter()
        resumed, tokens = len(rows), 0
        bar = tqdm(asked[resumed:], f"questions to {gguf.name.strip('.')}", total=len(asked), initial=resumed)
        for name, question in bar:
            try:
                row, length = predict_one(scorer, name, question, settings.max_new_tokens)
            except TooLong as error:
                raise Fail(
                    f"{test}, PMID {question.pmid}: {error}; raise {settings.section}.n_ctx in params.yaml to "
                    f"{error.tokens} or more, then run `dvc repro`"
                ) from None
            except Fail as error:
                raise Fail(f"{test}, PMID {question.pmid}: {error}") from None
            keep(row)
            tokens += length
        seconds = time.perf_counter() - loaded
        write_predictions(predictions, rows)
    return {
        "load_seconds": round(loaded - start, 2),
        "questions_per_second": round((len(rows) - resumed) / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
    }
