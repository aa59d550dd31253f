"""Measures of one model's decisions, and metrics/evaluate.json.

Accuracy and macro-F1 are PubMedQA's official measures (https://github.com/pubmedqa/pubmedqa, evaluation.py).
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.core.labels import LABELS
from pipeline.scoring.predictions import UNPARSABLE, Prediction, Predictions
from pipeline.scoring.protocols import PROTOCOLS

DECIMALS = 6  # of a figure in metrics/
MUCH = 0.5  # probability outside the three labels, above which accuracy says little about written answers
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]  # [..., gold, predicted], in the order of LABELS
Number = TypeVar("Number")


class Figures(BaseModel):
    """A group of figures, nested in metrics/*.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Figures):
    """A figure with a confidence interval."""

    value: float
    low: float
    high: float


class ByLabel(Figures, Generic[Number]):
    """A figure for each label."""

    yes: Number
    no: Number
    maybe: Number

    @classmethod
    def of(cls, values: Sequence[Number]) -> "ByLabel[Number]":
        """The values in the order of LABELS."""
        yes, no, maybe = values
        return cls(yes=yes, no=no, maybe=maybe)


class Written(Figures):
    """The greedy answers: the share without a decision, and the share that agree with the scored decision."""

    unparsable: float
    agreement: float


class Scores(Figures):
    """What the decisions under one protocol say about a model."""

    questions: int
    accuracy: Interval
    macro_f1: float
    recall: ByLabel[float]
    precision: ByLabel[float]
    predicted: ByLabel[float]  # shares of the decisions
    outside_labels: float  # mean probability of first words other than yes, no and maybe
    confusion: ByLabel[ByLabel[int]]  # gold label, then predicted label
    written: Written | None


def cells(*columns: Sequence[str]) -> Counts:
    """How often each combination of labels occurs, one axis a column: two columns give a confusion matrix."""
    counts = np.zeros([len(LABELS)] * len(columns), dtype=np.int64)
    np.add.at(counts, tuple(np.array([LABELS.index(label) for label in column]) for column in columns), 1)
    return counts


def confusion(rows: list[Prediction]) -> Counts:
    """Counts[gold, predicted]."""
    return cells([row.label for row in rows], [row.prediction for row in rows])


def accuracy(counts: Counts) -> Floats:
    """The share of right predictions."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def ratio(part: NDArray[np.integer], whole: NDArray[np.integer]) -> Floats:
    """part / whole, and 0 where whole is 0 (scikit-learn's zero_division=0)."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole != 0)


def recall(counts: Counts) -> Floats:
    """Of each label's questions, the share that is predicted to have it."""
    return ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1))


def precision(counts: Counts) -> Floats:
    """Of each label's predictions, the share that is right."""
    return ratio(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-2))


def macro_f1(counts: Counts) -> Floats:
    """The unweighted mean over yes, no and maybe of F1, 0 for a label that is neither gold nor predicted."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    return ratio(2 * right, counts.sum(axis=-1) + counts.sum(axis=-2)).mean(axis=-1)


def wilson(right: int, questions: int, confidence: float) -> Interval:
    """A share with Wilson's score interval (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    from scipy.stats import binomtest  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    found: Any = binomtest(right, questions).proportion_ci(confidence, method="wilson")
    return Interval(value=right / questions, low=float(found.low), high=float(found.high))


def outside_labels(rows: list[Prediction]) -> float:
    """Mean probability that the three labels do not have; float32 can sum theirs to a little over 1."""
    inside = np.exp(np.logaddexp.reduce([row.log_probabilities for row in rows], axis=1)).mean()
    return max(0.0, float(1 - inside))


def score(rows: list[Prediction], confidence: float) -> Scores:
    """All measures of the rows, unrounded."""
    counts = confusion(rows)
    greedy = [row for row in rows if row.greedy]
    return Scores(
        questions=len(rows),
        accuracy=wilson(int(np.trace(counts)), len(rows), confidence),
        macro_f1=float(macro_f1(counts)),
        recall=ByLabel[float].of(recall(counts).tolist()),
        precision=ByLabel[float].of(precision(counts).tolist()),
        predicted=ByLabel[float].of((counts.sum(axis=0) / len(rows)).tolist()),
        outside_labels=outside_labels(rows),
        confusion=ByLabel[ByLabel[int]].of([ByLabel[int].of(line) for line in counts.tolist()]),
        written=Written(
            unparsable=sum(row.greedy == UNPARSABLE for row in greedy) / len(greedy),
            agreement=sum(row.greedy == row.prediction for row in greedy) / len(greedy),
        )
        if greedy
        else None,
    )


def rounded(value: Any) -> Any:
    """Nested figures for a JSON file: floats to DECIMALS decimals, figures that do not apply left out."""
    match value:
        case BaseModel():
            return rounded(value.model_dump(exclude_none=True))
        case dict():
            return {key: rounded(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
        case float():
            return round(value, DECIMALS)
        case _:
            return value


def summary(tables: Predictions) -> dict[str, Any]:
    """Protocol -> its version and scores with 95 % intervals, for metrics/evaluate.json and baseline.json."""
    return {name: {"version": PROTOCOLS[name].version, **rounded(score(rows, 0.95))} for name, rows in tables.items()}
