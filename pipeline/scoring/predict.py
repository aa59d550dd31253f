"""A GGUF and the test questions -> a prediction for each, by protocol: what every measured model goes through."""

import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipeline.core.errors import Fail
from pipeline.core.files import read_rows
from pipeline.core.labels import LABELS
from pipeline.core.question import Question
from pipeline.core.resume import run_key
from pipeline.scoring.journal import journal
from pipeline.scoring.predictions import Prediction, parse, write_predictions
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.scoring.scorer import Scorer, TooLong, decide
from pipeline.sections.evaluate import CacheType, ProtocolName

EXTRAS = ["evaluate", "quantize"]  # of pyproject.toml: the packages that can change a prediction


class Settings(NamedTuple):
    """How a GGUF is asked, by a section of params.yaml."""

    section: str
    protocols: list[ProtocolName]
    n_ctx: int  # tokens
    max_new_tokens: int  # of the greedy answer
    cache_type: CacheType


Asked = tuple[ProtocolName, Question]


def parse_line(line: bytes, asked: Asked) -> Prediction:
    """The prediction in a line of the journal; raises ValueError or TypeError unless it answers `asked`."""
    row = parse([str(value) for value in json.loads(line)])
    protocol, question = asked
    if (row.protocol, row.pmid, row.label) != (protocol, question.pmid, question.label):
        raise ValueError("it answers another question")
    return row


def as_line(row: Prediction) -> str:
    """The prediction as a line of the journal."""
    return json.dumps(row.row())


def predict_one(scorer: Scorer, name: ProtocolName, question: Question, max_new_tokens: int) -> tuple[Prediction, int]:
    """The prediction for one question under one protocol, and the number of the prompt's tokens."""
    protocol = PROTOCOLS[name]
    tokens, choices = scorer.encode(protocol.prompt(question), protocol)
    scores, first = scorer.score(tokens, choices)
    greedy = scorer.greedy(first, len(tokens), max_new_tokens) if protocol.greedy else ""
    yes, no, maybe = (scores[label] for label in LABELS)
    top = int(first.argmax())
    return Prediction(name, question.pmid, question.label, (yes, no, maybe), decide(scores), greedy, top), len(tokens)


@contextmanager
def named_errors(place: str, section: str) -> Generator[None]:
    """Name the question at `place` in a `Fail`, and for a prompt that is too long the parameter of `section`."""
    try:
        yield
    except TooLong as error:
        remedy = f"raise {section}.n_ctx in params.yaml to {error.tokens} or more, then run `dvc repro`"
        raise Fail(f"{place}: {error}; {remedy}") from None
    except Fail as error:
        raise Fail(f"{place}: {error}") from None


@contextmanager
def predicted(gguf: Path, test: Path, settings: Settings) -> Generator[tuple[list[Prediction], dict[str, float]]]:
    """A prediction for each protocol and question of `test`, asked of `gguf`; and load time and speed.

    Write the predictions inside the context: the journal is removed at its end.
    """
    questions = read_rows(test, Question)
    asked: list[Asked] = [(name, row) for name in PROTOCOLS if name in settings.protocols for row in questions]
    start = time.perf_counter()
    remedy = f"lower {settings.section}.n_ctx in params.yaml, set N_GPU_LAYERS lower, or run `dvc checkout {gguf}`"
    key = run_key(settings._asdict(), [gguf, test], EXTRAS, os.environ.get("N_GPU_LAYERS", ""))
    with journal(key, asked, parse_line, as_line) as (rows, keep):
        with Scorer(gguf, settings.n_ctx, remedy, settings.cache_type) as scorer:
            loaded = time.perf_counter()
            resumed, tokens = len(rows), 0
            bar = tqdm(asked[resumed:], f"questions to {gguf.name.strip('.')}", total=len(asked), initial=resumed)
            for name, question in bar:
                with named_errors(f"{test}, PMID {question.pmid}", settings.section):
                    row, length = predict_one(scorer, name, question, settings.max_new_tokens)
                keep(row)
                tokens += length
            seconds = time.perf_counter() - loaded
        yield (
            rows,
            {
                "load_seconds": round(loaded - start, 2),
                "questions_per_second": round((len(rows) - resumed) / seconds, 2),
                "tokens_per_second": round(tokens / seconds, 1),
            },
        )


def predict(gguf: Path, test: Path, settings: Settings, predictions: Path) -> dict[str, float]:
    """Write what `predicted` yields to the table PREDICTIONS; returns load time and speed."""
    with predicted(gguf, test, settings) as (rows, speed):
        write_predictions(predictions, rows)
    return speed
