"""The measures of a table of predictions: counted by hand, against published figures, and against scikit-learn."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as oracle

from pipeline.core.stage import Fail
from pipeline.scoring import measures
from pipeline.scoring.measures import COLUMNS, Prediction
from pipeline.scoring.protocols import LABELS

HEADER = "protocol,pmid,label,yes,no,maybe,prediction,greedy,top_token"
ROW = "chat,1,yes,-0.100000,-3.000000,-4.000000,yes,yes,17"
TEST_SPLIT = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55  # PubMedQA's 500 test questions


def predictions(gold: list[str], predicted: list[str]) -> list[Prediction]:
    return [
        Prediction(str(i), label, (-1.0, -1.0, -1.0), prediction, prediction, 17)
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


@pytest.mark.parametrize("measure", [measures.accuracy, measures.macro_f1, measures.recall, measures.precision])
def test_the_measures_of_many_tables_at_once_are_those_of_each(measure: Callable[[measures.Counts], Any]) -> None:
    tables = np.random.default_rng(0).integers(0, 50, size=(4, 3, 3))
    tables[0, 2] = tables[0, :, 2] = 0
    assert measure(tables) == pytest.approx(np.array([measure(counts) for counts in tables]))


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


def test_a_wilson_interval_holds_its_share_and_never_leaves_0_to_1() -> None:
    for questions in range(1, 200):
        for right in (0, 1, questions // 2, questions):
            low, high = measures.wilson(right, questions, 0.95)
            assert 0 <= low <= high <= 1
            assert low - 1e-12 <= right / questions <= high + 1e-12


def test_unparsable_and_disagreeing_answers_are_counted_and_never_taken_for_maybe() -> None:
    rows = predictions(["yes"] * 5, ["yes", "yes", "no", "maybe", "yes"])
    rows[0] = rows[0]._replace(greedy="unparsable")
    rows[1] = rows[1]._replace(greedy="no")
    scores = measures.score(rows, 0.95)
    assert (scores["unparsable_rate"], scores["greedy_agreement"]) == (0.2, 0.6)
    assert scores["predicted_maybe"] == 0.2


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    lm_eval = ROW.replace("chat", "lm_eval").replace("yes,yes,17", "yes,,17")
    path = write(tmp_path / "p.csv", HEADER, lm_eval, "chat,22,no,-2.5,-0.2,-3.25,no,unparsable,3", ROW)
    assert ",".join(COLUMNS) == HEADER
    first, second = (
        Prediction("1", "yes", (-0.1, -3.0, -4.0), "yes", "yes", 17),
        Prediction("22", "no", (-2.5, -0.2, -3.25), "no", "unparsable", 3),
    )
    assert measures.read_predictions(path) == {"chat": [first, second], "lm_eval": [first._replace(greedy="")]}
    scores = measures.summary(path)
    assert {name: (of["version"], of["questions"], of["accuracy"]) for name, of in scores.items()} == {
        "chat": (1, 2, 1),
        "lm_eval": (1, 1, 1),
    }
    assert scores["chat"]["unparsable_rate"] == 0.5
    assert "unparsable_rate" not in scores["lm_eval"]


def test_a_header_alone_is_the_table_of_a_model_that_was_not_measured(tmp_path: Path) -> None:
    assert measures.read_predictions(write(tmp_path / "p.csv", HEADER)) == {}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("chat,7,yes,nan,-3,-4,yes,yes,1", "not a logarithm"),
        ("chat,7,yes,-inf,-3,-4,no,yes,1", "not a logarithm"),
        ("chat,7,yes,0.9,-3,-4,yes,yes,1", "not a logarithm"),  # a probability
        ("chat,7,yes,many,-3,-4,yes,yes,1", "many"),
        ("chat,7,Yes,-1,-3,-4,yes,yes,1", "unknown label"),
        ("chat,7,yes,-1,-3,-4,yes,,1", "unknown label"),
        ("lm_eval,7,yes,-1,-3,-4,yes,yes,1", "unknown label"),  # no answer is written there
        ("chat,7,yes,-5,-3,-4,yes,yes,1", "not the most probable"),
        ("chat,7,yes,-1,-3,-4,yes,yes,x", "invalid literal"),
        ("letters,7,yes,-1,-3,-4,yes,yes,1", "unknown protocol"),
        ("chat,1,yes,-1,-3,-4,yes,yes,1", "twice under chat"),
        ("chat,7,yes,0.0011,-3,-4,yes,yes,1", "not a logarithm"),
        ("chat,7,yes,-1,-3,-4,yes", "7 fields"),
        ("chat,7", "2 fields"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_pmid(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "p.csv", HEADER, ROW, line)
    with pytest.raises(Fail, match=problem) as error:
        measures.read_predictions(path)
    assert f"{path}, line 3 (PMID {line.split(',')[1]})" in str(error.value)


def test_a_row_without_a_pmid_and_a_rounded_certainty(tmp_path: Path) -> None:
    with pytest.raises(Fail, match=r"line 2 \(PMID missing\): 1 fields"):
        measures.read_predictions(write(tmp_path / "p.csv", HEADER, "chat"))
    sure = ROW.replace("-0.100000", "0.001000")  # float32 rounds a logarithm of 1 to a little above 0
    assert measures.read_predictions(write(tmp_path / "p.csv", HEADER, sure))["chat"][0].log_probabilities[0] == 0.001


@pytest.mark.parametrize("lines", [[], ["pmid,label", ROW], [ROW]])
def test_a_file_that_is_no_table_of_predictions_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(Fail, match=r"p\.csv is not a table"):
        measures.read_predictions(write(tmp_path / "p.csv", *lines))


def test_a_missing_table_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Fail, match="is missing; run"):
        measures.read_predictions(tmp_path / "p.csv")
