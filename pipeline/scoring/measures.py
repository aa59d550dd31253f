"""The table of predictions that `evaluate` and its like write: its one reader, and the measures of one model.

Accuracy and macro-F1 are PubMedQA's official measures (https://github.com/pubmedqa/pubmedqa, evaluation.py). Whatever
compares tables or judges probabilities is in `compare`, so that an edit to it never scores a model again.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.core.records import read_text
from pipeline.core.stage import Fail
from pipeline.scoring.protocols import LABELS, PROTOCOLS

COLUMNS = ["protocol", "pmid", "label", *LABELS, "prediction", "greedy", "top_token"]
UNPARSABLE = "unparsable"  # a greedy answer without a decision: never counted as 'maybe'

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]  # [..., gold, predicted], in the order of LABELS


class Prediction(NamedTuple):
    """A question's gold label, what the model makes of it, and what the model writes."""

    pmid: str
    label: str
    log_probabilities: tuple[float, float, float]  # natural logarithms, in the order of LABELS; they need not sum to 1
    prediction: str
    greedy: str  # empty where the protocol asks for no written answer
    top_token: int  # id of the most probable next token, label or not


Predictions = dict[str, list[Prediction]]  # by protocol, each in the order of PMIDs


def parse(row: list[str]) -> tuple[str, Prediction]:
    """A line of the table and its protocol; raises ValueError with what is wrong with it."""
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} fields in place of {len(COLUMNS)}")
    protocol, pmid, label, yes, no, maybe, prediction, greedy, top_token = row
    scores = (float(yes), float(no), float(maybe))
    if not all(math.isfinite(score) and score <= 1e-3 for score in scores):  # a little above 0: float32's rounding
        raise ValueError("a score that is not a logarithm of a probability")
    if protocol not in PROTOCOLS:
        raise ValueError("an unknown protocol")
    answers = (*LABELS, UNPARSABLE) if protocol == "chat" else ("",)
    if label not in LABELS or prediction not in LABELS or greedy not in answers:
        raise ValueError("an unknown label")
    if scores[LABELS.index(prediction)] < max(scores):
        raise ValueError(f"prediction {prediction} is not the most probable label")
    return protocol, Prediction(pmid, label, scores, prediction, greedy, int(top_token))


def parse_predictions(text: str, name: str) -> Predictions:
    """The checked rows of a table of predictions, of which `name` is told in errors; raises `Fail` with line and PMID.

    A header alone is an empty table: the table of a model that was not measured.
    """
    try:
        header, *lines = csv.reader(text.splitlines() or [""])
    except csv.Error as error:
        raise Fail(f"{name} is no table ({error}); run `dvc repro`") from None
    if header != COLUMNS:
        raise Fail(f"{name} is not a table of predictions with the columns {','.join(COLUMNS)}; run `dvc repro`")
    rows: dict[tuple[str, str], Prediction] = {}
    for number, line in enumerate(lines, 2):
        try:
            protocol, row = parse(line)
            if (protocol, row.pmid) in rows:
                raise ValueError(f"the PMID comes twice under {protocol}")
        except ValueError as error:
            pmid = line[1] if line[1:] else "missing"
            raise Fail(f"{name}, line {number} (PMID {pmid}): {error}; run `dvc repro`") from None
        rows[protocol, row.pmid] = row
    tables: Predictions = {}
    for protocol, pmid in sorted(rows):
        tables.setdefault(protocol, []).append(rows[protocol, pmid])
    return tables


def read_predictions(path: Path) -> Predictions:
    """`parse_predictions` of a file."""
    return parse_predictions(read_text(path), str(path))


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


def wilson(right: int, questions: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, penalty = right / questions, z * z / questions
    half = z * math.sqrt(share * (1 - share) / questions + penalty / (4 * questions))
    low, high = ((share + penalty / 2 + side) / (1 + penalty) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


def score(rows: list[Prediction], confidence: float) -> dict[str, float]:
    """Everything that the decisions say about their model: flat numbers, shares to six decimals."""
    counts = confusion(rows)
    low, high = wilson(int(np.trace(counts)), len(rows), confidence)
    shares = {"accuracy": accuracy(counts), "accuracy_low": low, "accuracy_high": high, "macro_f1": macro_f1(counts)}
    predicted = counts.sum(axis=0) / len(rows)
    for name, values in {"recall": recall(counts), "precision": precision(counts), "predicted": predicted}.items():
        shares |= {f"{name}_{label}": value for label, value in zip(LABELS, values, strict=True)}
    if written := [row for row in rows if row.greedy]:
        shares["unparsable_rate"] = sum(row.greedy == UNPARSABLE for row in written) / len(written)
        shares["greedy_agreement"] = sum(row.greedy == row.prediction for row in written) / len(written)
    return {
        "questions": len(rows),
        **{name: round(float(value), 6) for name, value in shares.items()},
        **{f"confusion_{LABELS[gold]}_{LABELS[label]}": int(count) for (gold, label), count in np.ndenumerate(counts)},
    }


def summary(path: Path) -> dict[str, dict[str, float]]:
    """The scores of the predictions in `path` by protocol, with its version; the interval is the usual one, of 95 %."""
    tables = read_predictions(path)
    return {name: {"version": PROTOCOLS[name], **score(rows, 0.95)} for name, rows in tables.items()}
