"""Written answers, data/answers.jsonl: what `generate` writes, with texts, so not in git."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.core.files import read_rows, read_text

ModelName = Literal["tuned", "base"]


class Answer(BaseModel):
    """A model's greedy answer to a test question under the protocol `chat`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: ModelName
    pmid: str
    text: str
    tokens: int  # without the end of the turn
    ended: bool  # by an end of turn, not by generate.max_new_tokens


def read_answers(path: Path) -> list[Answer]:
    """The answers in a file, none if `generate.enabled` was false; raises `Fail`."""
    return read_rows(path, Answer) if read_text(path) else []
