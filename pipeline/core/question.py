"""A test question as each protocol asks it: a line of data/formatted/test.jsonl."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from pipeline.core.labels import Label


class Message(TypedDict):
    """One turn of a chat. A dict, because chat templates read it as one."""

    role: Literal["system", "user", "assistant"]
    content: str


Messages = Annotated[list[Message], Field(min_length=1)]


class Question(BaseModel):
    """What a model is asked, by protocol, and the gold label."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    pmid: str
    label: Label
    text: str  # abstract and question as plain text, for the text baselines
    chat: Messages
    question_only: Messages
    lm_eval: str
