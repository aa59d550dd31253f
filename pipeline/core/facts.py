"""What is known about a test question, without its words: a line of data/formatted/test_facts.jsonl."""

from pydantic import BaseModel, ConfigDict


class QuestionFacts(BaseModel):
    """What slices of the test questions are made by."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    pmid: str
    year: int | None  # of publication; None if the record does not say
    abstract_words: int
    numeric_results: bool  # whether the abstract has a percentage, a decimal number, a p-value or a ±
