"""Accuracy on parts of the test questions: by label, year of publication, and what the abstract is like.

The bounds are fixed, so that a slice means the same in every run.
"""

from collections.abc import Sequence

from pipeline.core.errors import Fail
from pipeline.core.facts import QuestionFacts
from pipeline.core.labels import LABELS
from pipeline.reporting.comparison import SMALL_SLICE, Slice
from pipeline.scoring.measures import score
from pipeline.scoring.predictions import Prediction

# First value above the slice -> its name.
YEARS = {2005: "before 2005", 2010: "2005 to 2009", 2015: "2010 to 2014", 2020: "2015 to 2019", 10_000: "2020 or later"}
WORDS = {150: "0 to 149", 200: "150 to 199", 250: "200 to 249", 1 << 63: "250 or more"}
UNKNOWN = "unknown"


def within(bounds: dict[int, str], value: int) -> str:
    """The name of the slice that `value` is in."""
    return next(name for end, name in bounds.items() if value < end)


def slices(
    rows: Sequence[Prediction], facts: Sequence[QuestionFacts], confidence: float
) -> dict[str, dict[str, Slice]]:
    """Kind of slice -> value -> accuracy; a value that no question has is left out.

    Raises `Fail` unless there are facts about exactly the questions of `rows`.
    """
    about = {fact.pmid: fact for fact in facts}
    if apart := {row.pmid for row in rows} ^ about.keys():
        raise Fail(f"the tuned model's predictions and test_facts.jsonl differ in PMID {min(apart)}; run `dvc repro`")
    groups: dict[str, dict[str, list[Prediction]]] = {
        "label": {label: [] for label in LABELS},
        "year": {name: [] for name in (*YEARS.values(), UNKNOWN)},
        "abstract_words": {name: [] for name in WORDS.values()},
        "numeric_results": {"present": [], "absent": []},
    }
    for row in rows:
        fact = about[row.pmid]
        groups["label"][row.label].append(row)
        groups["year"][within(YEARS, fact.year) if fact.year is not None else UNKNOWN].append(row)
        groups["abstract_words"][within(WORDS, fact.abstract_words)].append(row)
        groups["numeric_results"]["present" if fact.numeric_results else "absent"].append(row)
    return {
        kind: {
            value: Slice(questions=len(some), few=len(some) < SMALL_SLICE, accuracy=score(some, confidence).accuracy)
            for value, some in values.items()
            if some
        }
        for kind, values in groups.items()
    }
