"""What `report` and the error browser know of a test question beside its words: two files of data/formatted."""

from pydantic import BaseModel, ConfigDict


class QuestionFacts(BaseModel):
    """What slices of the test questions are made by: a line of test_facts.jsonl."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    pmid: str
    year: int | None  # of publication; None if the record does not say
    abstract_words: int
    numeric_results: bool  # whether the abstract has a percentage, a decimal number, a p-value or a ±


class Conclusion(BaseModel):
    """LONG_ANSWER, the conclusion that the authors of an abstract drew: a line of conclusions.jsonl.

    It is in a file of its own so that no stage that asks a model can put it into a prompt.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    pmid: str
    long_answer: str
