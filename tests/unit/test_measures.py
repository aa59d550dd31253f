"""The measures of a table of predictions: counted by hand, against published figures, and against scikit-learn."""

import random
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as oracle

from pipeline import measures
from pipeline.measures import COLUMNS, Prediction
from pipeline.prompt import LABELS
from pipeline.stage import Fail

HEADER = "pmid,label,yes,no,maybe,prediction,greedy"
ROW = "1,yes,-0.100000,-3.000000,-4.000000,yes,yes"
TEST_SPLIT = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55  # PubMedQA's 500 test questions


def predictions(gold: list[str], predicted: list[str]) -> list[Prediction]:
    return [
        Prediction(str(i), label, (-1.0, -1.0, -1.0), prediction, prediction)
        for i, (label, prediction) in enumerate(zip(gold, predicted, strict=True))
    ]


def random_labels(count: int, seed: int) -> list[str]:
    return random.Random(seed).choices(LABELS, [5, 3, 1], k=count)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_majority_label_scores_what_is_published_for_pubmedqa() -> None:
    scores = measures.score(predictions(TEST_SPLIT, ["yes"] * 500), 0.95)
    assert scores["accuracy"] == 0.552
    assert round(100 * scores["macro_f1"], 1) == 23.7
    assert (scores["recall_yes"], scores["recall_no"], scores["recall_maybe"]) == (1, 0, 0)
    assert (scores["precision_yes"], scores["precision_maybe"]) == (0.552, 0)


def test_scores_counted_by_hand() -> None:
    gold = ["yes", "yes", "yes", "yes", "no", "no", "maybe", "maybe"]
    predicted = ["yes", "yes", "yes", "no", "no", "yes", "yes", "maybe"]
    scores = measures.score(predictions(gold, predicted), 0.95)
    assert scores["questions"] == 8
    assert scores["accuracy"] == 5 / 8
    assert scores["recall_yes"] == 3 / 4
    assert scores["precision_yes"] == 3 / 5
    assert scores["precision_maybe"] == 1
    # F1: yes 2*3/(4+5), no 2*1/(2+2), maybe 2*1/(2+1)
    assert scores["macro_f1"] == round((6 / 9 + 2 / 4 + 2 / 3) / 3, 6)
    confusion = [[scores[f"confusion_{g}_{p}"] for p in LABELS] for g in LABELS]
    assert confusion == [[3, 1, 0], [1, 1, 0], [1, 0, 1]]
    assert (scores["predicted_yes"], scores["predicted_no"], scores["predicted_maybe"]) == (0.625, 0.25, 0.125)


@pytest.mark.parametrize("seed", range(5))
def test_measures_equal_scikit_learn(seed: int) -> None:
    gold, predicted = random_labels(200, seed), random_labels(200, seed + 100)
    counts = measures.confusion(predictions(gold, predicted))
    labels = list(LABELS)
    assert counts.tolist() == oracle.confusion_matrix(gold, predicted, labels=labels).tolist()
    precision, recall, f1, _ = oracle.precision_recall_fscore_support(gold, predicted, labels=labels)
    assert measures.precision(counts) == pytest.approx(precision)
    assert measures.recall(counts) == pytest.approx(recall)
    assert measures.macro_f1(counts) == pytest.approx(np.mean(f1))
    # PubMedQA's evaluation.py: accuracy_score and f1_score(average="macro") over all test PMIDs.
    assert measures.accuracy(counts) == pytest.approx(oracle.accuracy_score(gold, predicted))
    assert measures.macro_f1(counts) == pytest.approx(oracle.f1_score(gold, predicted, average="macro"))


def test_a_label_that_nobody_has_or_gives_counts_as_f1_of_zero() -> None:
    counts = measures.confusion(predictions(["yes", "no"], ["yes", "no"]))
    assert measures.macro_f1(counts) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    [
        (375, 500, 71.0, 78.6),
        (390, 500, 74.2, 81.4),
        (400, 500, 76.3, 83.3),
        (0, 10, 0.0, 27.8),
        (10, 10, 72.2, 100.0),
    ],
)
def test_wilson_intervals_are_the_published_ones(right: int, questions: int, low: float, high: float) -> None:
    interval = measures.wilson(right, questions, 0.95)
    assert [round(100 * end, 1) for end in interval] == [low, high]


def test_unparsable_and_disagreeing_answers_are_counted_and_never_taken_for_maybe() -> None:
    rows = predictions(["yes"] * 4, ["yes", "yes", "no", "maybe"])
    rows[0] = rows[0]._replace(greedy="unparsable")
    rows[1] = rows[1]._replace(greedy="no")
    scores = measures.score(rows, 0.95)
    assert (scores["unparsable_rate"], scores["greedy_agreement"]) == (0.25, 0.5)
    assert scores["predicted_maybe"] == 0.25


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", HEADER, ROW, "22,no,-2.5,-0.2,-3.25,no,unparsable")
    assert ",".join(COLUMNS) == HEADER
    assert measures.read_predictions(path) == [
        Prediction("1", "yes", (-0.1, -3.0, -4.0), "yes", "yes"),
        Prediction("22", "no", (-2.5, -0.2, -3.25), "no", "unparsable"),
    ]
    assert measures.summary(path)["accuracy"] == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("7,yes,nan,-3,-4,yes,yes", "not a logarithm"),
        ("7,yes,-inf,-3,-4,no,yes", "not a logarithm"),
        ("7,yes,0.9,-3,-4,yes,yes", "not a logarithm"),  # a probability
        ("7,yes,many,-3,-4,yes,yes", "many"),
        ("7,Yes,-1,-3,-4,yes,yes", "unknown label"),
        ("7,yes,-1,-3,-4,yes,", "unknown label"),
        ("7,yes,-5,-3,-4,yes,yes", "not the most probable"),
        ("1,yes,-1,-3,-4,yes,yes", "twice"),
        ("7,yes,-1,-3,-4,yes", "6 fields"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_pmid(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "p.csv", HEADER, ROW, line)
    with pytest.raises(Fail, match=problem) as error:
        measures.read_predictions(path)
    assert f"{path}, line 3 (PMID {line[0]})" in str(error.value)


@pytest.mark.parametrize("lines", [[], [HEADER], ["pmid,label", ROW], [ROW]])
def test_a_file_that_is_no_table_of_predictions_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(Fail, match=r"p\.csv is not a table"):
        measures.read_predictions(write(tmp_path / "p.csv", *lines))


def test_a_missing_table_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Fail, match="is missing; run"):
        measures.read_predictions(tmp_path / "p.csv")
