"""A test question's LONG_ANSWER: a line of data/formatted/conclusions.jsonl.

It is in a file of its own so that no stage that asks a model can put it into a prompt: only `report` and the error
browser read it.
"""

from pydantic import BaseModel, ConfigDict


class Conclusion(BaseModel):
    """The conclusion that the authors of an abstract drew."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    pmid: str
    long_answer: str
