"""The measures of a model's decisions: counted by hand, against published figures, and against scikit-learn."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as oracle

from pipeline.core.labels import LABELS, Label
from pipeline.scoring import measures
from pipeline.scoring.measures import ByLabel, score, summary, wilson
from pipeline.scoring.predictions import Prediction


def predictions(gold: list[Label], predicted: list[Label]) -> list[Prediction]:
    return [
        Prediction("chat", str(i), label, (-1.0, -1.0, -1.0), prediction, prediction, 17)
        for i, (label, prediction) in enumerate(zip(gold, predicted, strict=True))
    ]


def random_labels(count: int, seed: int) -> list[Label]:
    return random.Random(seed).choices(LABELS, [5, 3, 1], k=count)


def test_scores_counted_by_hand():
    gold: list[Label] = ["yes", "yes", "yes", "yes", "no", "no", "maybe", "maybe"]
    scores = score(predictions(gold, ["yes", "yes", "yes", "no", "no", "yes", "yes", "maybe"]), 0.95)
    assert scores.accuracy.value == 5 / 8
    assert scores.recall == ByLabel(yes=3 / 4, no=1 / 2, maybe=1 / 2)
    assert scores.precision == ByLabel(yes=3 / 5, no=1 / 2, maybe=1)
    assert scores.macro_f1 == pytest.approx((6 / 9 + 2 / 4 + 2 / 3) / 3)
    assert scores.predicted == ByLabel(yes=5 / 8, no=2 / 8, maybe=1 / 8)
    assert scores.confusion == ByLabel(
        yes=ByLabel(yes=3, no=1, maybe=0), no=ByLabel(yes=1, no=1, maybe=0), maybe=ByLabel(yes=1, no=0, maybe=1)
    )


@pytest.mark.parametrize("seed", range(5))
def test_measures_equal_scikit_learn(seed: int):
    gold, predicted = random_labels(200, seed), random_labels(200, seed + 100)
    counts = measures.confusion(predictions(gold, predicted))
    labels = list(LABELS)
    assert counts.tolist() == oracle.confusion_matrix(gold, predicted, labels=labels).tolist()
    precision, recall, _, _ = oracle.precision_recall_fscore_support(gold, predicted, labels=labels)
    assert measures.precision(counts) == pytest.approx(precision)
    assert measures.recall(counts) == pytest.approx(recall)
    # PubMedQA's evaluation.py: accuracy_score and f1_score(average="macro") over all test PMIDs.
    assert measures.accuracy(counts) == pytest.approx(oracle.accuracy_score(gold, predicted))
    assert measures.macro_f1(counts) == pytest.approx(oracle.f1_score(gold, predicted, average="macro"))


@pytest.mark.parametrize("measure", [measures.accuracy, measures.macro_f1, measures.recall, measures.precision])
def test_the_measures_of_many_tables_at_once_are_those_of_each(measure: Callable[[measures.Counts], Any]):
    tables = np.random.default_rng(0).integers(0, 50, size=(4, 3, 3))
    tables[0, 2] = tables[0, :, 2] = 0
    assert measure(tables) == pytest.approx(np.array([measure(counts) for counts in tables]))


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    [(375, 500, 71.0, 78.6), (390, 500, 74.2, 81.4), (400, 500, 76.3, 83.3), (0, 10, 0.0, 27.8), (10, 10, 72.2, 100)],
)
def test_wilson_intervals_are_the_published_ones(right: int, questions: int, low: float, high: float):
    interval = wilson(right, questions, 0.95)
    assert (round(100 * interval.low, 1), round(100 * interval.high, 1)) == (low, high)


def test_unparsable_and_disagreeing_answers_are_counted_and_never_taken_for_maybe():
    rows = predictions(["yes"] * 5, ["yes", "yes", "no", "maybe", "yes"])
    rows[0] = rows[0]._replace(greedy="unparsable")
    rows[4] = rows[4]._replace(greedy="unparsable")
    rows[1] = rows[1]._replace(greedy="no")
    scores = score(rows, 0.95)
    assert scores.written
    assert (scores.written.unparsable, scores.written.agreement) == (0.4, 0.4)
    assert scores.predicted.maybe == 0.2


def test_outside_labels_is_the_mean_probability_that_the_three_labels_do_not_have():
    sure, unsure = (tuple(np.log(shares)) for shares in ([0.5, 0.25, 0.125], [0.1, 0.1, 0.05]))
    rows = [
        row._replace(log_probabilities=scores)
        for row, scores in zip(predictions(["yes", "no"], ["yes", "yes"]), (sure, unsure), strict=True)
    ]
    assert measures.outside_labels(rows) == pytest.approx((0.125 + 0.75) / 2)


def test_a_summary_has_the_version_of_each_protocol_and_rounded_figures():
    rows = predictions(["yes", "no", "no"], ["yes", "no", "yes"])
    found = summary({"chat": rows, "lm_eval": [row._replace(greedy="") for row in rows]})
    assert {name: (of["version"], of["accuracy"]["value"], "written" in of) for name, of in found.items()} == {
        "chat": (1, 0.666667, True),
        "lm_eval": (1, 0.666667, False),
    }
