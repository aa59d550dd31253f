"""A PubMedQA record.

The schema is that of PQA-L (Jin et al. 2019, https://arxiv.org/abs/1909.06146; https://github.com/pubmedqa/pubmedqa).
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.core.labels import Label


def encodable(text: str) -> str:
    """Require text that can be written as UTF-8 (JSON's \\ud800 alone cannot)."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair")
    return text


def written(text: str) -> str:
    """Require text that is not blank and can be written as UTF-8."""
    if not text.strip():
        raise ValueError("is empty")
    return encodable(text)


def four_digits(value: Any) -> int | None:
    """A year written as text or as a number; anything else is an unknown year."""
    return int(value) if len(str(value)) == 4 and str(value).isdecimal() else None


Text = Annotated[str, AfterValidator(written)]
Name = Annotated[str, AfterValidator(encodable)]


class Record(BaseModel):
    """One question. Other fields of PubMedQA's files are ignored: `reasoning_*` and MESHES among them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)

    question: Text = Field(alias="QUESTION")
    contexts: Annotated[list[Text], Field(min_length=1, alias="CONTEXTS")]  # the abstract's sections
    labels: list[Name] = Field(alias="LABELS")  # their names
    long_answer: Text = Field(alias="LONG_ANSWER")  # the abstract's conclusion
    final_decision: Label
    year: Annotated[int | None, BeforeValidator(four_digits)] = Field(default=None, alias="YEAR")  # of publication
    group: Text | None = None  # ours: a patient or a study; all its questions are in one split

    @property
    def words(self) -> str:
        """Question and abstract, lower-cased, with single spaces: equal for duplicates."""
        return " ".join(" ".join([self.question, *self.contexts]).lower().split())


def parse_record(pmid: str, value: Any) -> tuple[Record | None, list[str]]:
    """The record if it is valid, and a phrase for each problem."""
    found: list[str] = []
    record: Record | None = None
    try:
        written(pmid)
    except ValueError as error:
        found.append(f"the identifier {error}")
    try:
        record = Record.model_validate(value)
        if len(record.labels) != len(record.contexts):
            found.append(f"LABELS has {len(record.labels)} entries for {len(record.contexts)} CONTEXTS")
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            field = ".".join(map(str, problem["loc"])) or "record"
            found.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}")
    return (None if found else record), [f"{pmid}: {problem}" for problem in found]
