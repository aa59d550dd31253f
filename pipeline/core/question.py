"""A question: a line of data/formatted/test.jsonl and of validation_questions.jsonl.

`scoring.protocols` turns it into words for a model.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import TypedDict

from pipeline.core.labels import Label


class Message(TypedDict):
    """One turn of a chat. A dict, because chat templates read it as one."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(BaseModel):
    """What a model is asked, and the gold label."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    pmid: str
    label: Label
    system_prompt: str
    question: str
    contexts: list[str]  # the abstract's sections
    labels: list[str]  # their names

    @model_validator(mode="after")
    def _names(self) -> Self:
        if len(self.labels) != len(self.contexts):
            raise ValueError(f"labels has {len(self.labels)} entries for {len(self.contexts)} contexts")
        return self
