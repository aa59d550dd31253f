"""One model's probabilities, two models on the same questions: counted by hand, against libraries, by simulation."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from pipeline.core.stage import Fail
from pipeline.reporting import compare
from pipeline.scoring.measures import Prediction
from pipeline.scoring.protocols import LABELS
from tests.tables import GOLD, model

PARAMS = compare.Params(bootstrap_samples=10_000, seed=0, confidence=0.95, bins=10)


def answered(gold: str, *probabilities: float, pmid: str = "1") -> Prediction:
    """A question with these probabilities of yes, no and maybe, up to a factor that scoring leaves out."""
    yes, no, maybe = (math.log(p / 2) for p in probabilities)
    prediction = LABELS[int(np.argmax(probabilities))]
    return Prediction(pmid, gold, (yes, no, maybe), prediction, prediction, 7)


# One model


def test_probabilities_are_shares_of_the_three_labels() -> None:
    rows = [answered("yes", 0.5, 0.25, 0.25), Prediction("2", "no", (-800.0, -801.0, -900.0), "yes", "yes", 7)]
    assert compare.probabilities(rows)[0] == pytest.approx([0.5, 0.25, 0.25])
    assert compare.probabilities(rows)[1] == pytest.approx([1 / (1 + 1 / math.e), 1 / (1 + math.e), 0], abs=1e-12)
    assert compare.of_gold(rows) == pytest.approx([0.5, 1 / (1 + math.e)])


def test_brier_counted_by_hand() -> None:
    assert compare.brier([answered("yes", 0.5, 0.25, 0.25)]) == pytest.approx(0.25 + 0.0625 + 0.0625)
    sure = [answered("yes", 1 - 2e-12, 1e-12, 1e-12), answered("no", 1 - 2e-12, 1e-12, 1e-12)]
    assert compare.brier(sure) == pytest.approx((0 + 2) / 2)


def test_calibration_error_and_its_bins_counted_by_hand() -> None:
    rows = [
        answered("yes", 0.45, 0.35, 0.2),  # bin 0.4 to 0.5: right
        answered("no", 0.41, 0.39, 0.2),  # the same bin: wrong
        answered("yes", 0.92, 0.04, 0.04),  # 0.9 to 1: right
        answered("maybe", 1, 1e-30, 1e-30),  # a probability of 1 belongs to the last bin: wrong
    ]
    assert compare.probabilities(rows).max() == 1
    low, high = compare.reliability(rows, 10)
    assert (low.low, low.high, low.questions, low.accuracy) == (0.4, 0.5, 2, 0.5)
    assert low.confidence == pytest.approx(0.43)
    assert (high.low, high.high, high.questions, high.accuracy) == (0.9, 1.0, 2, 0.5)
    expected = (2 * abs(0.43 - 0.5) + 2 * abs(0.96 - 0.5)) / 4
    assert compare.expected_calibration_error(rows, 10) == pytest.approx(expected)


def test_a_model_that_is_right_as_often_as_it_is_sure_has_no_calibration_error() -> None:
    rows = [answered("yes" if i < 7 else "no", 0.7, 0.2, 0.1) for i in range(10)]
    assert compare.expected_calibration_error(rows, 10) == pytest.approx(0)
    assert compare.expected_calibration_error(rows, 3) == pytest.approx(0)


def test_risk_coverage_counted_by_hand_and_equally_sure_questions_are_answered_together() -> None:
    rows = [
        answered("yes", 0.9, 0.05, 0.05),
        answered("no", 0.6, 0.3, 0.1),  # wrong
        answered("yes", 0.6, 0.3, 0.1),  # as sure, and right: half a wrong one each
        answered("no", 0.5, 0.3, 0.2),  # wrong
    ]
    curve = [(0.25, 0.0), (0.5, 0.25), (0.75, 1 / 3), (1.0, 0.5)]
    assert [value for point in compare.risk_coverage(rows) for value in point] == pytest.approx(
        [value for point in curve for value in point]
    )
    assert compare.risk_coverage(rows[::-1]) == compare.risk_coverage(rows)
    assert compare.believable(rows, 10)["risk_coverage_area"] == pytest.approx((0.25 + 1 / 3 + 0.5) / 4)


# Two models


@pytest.mark.parametrize(
    ("first_only", "second_only", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (9, 1, 0.021484375), (10, 10, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_test(first_only: int, second_only: int, p: float) -> None:
    assert compare.mcnemar(first_only, second_only) == pytest.approx(p)


def bootstrap(first: list[Prediction], second: list[Prediction], **changes: float) -> dict[str, tuple[float, float]]:
    return compare.paired_bootstrap(first, second, PARAMS.model_copy(update=changes))


def test_bootstrap_of_equal_models_is_zero_wide_and_of_a_sure_gain_is_its_binomial_interval() -> None:
    base, perfect = model(0.5, 1), model(1.0, 1)
    assert bootstrap(base, base) == {"accuracy": (0, 0), "macro_f1": (0, 0)}
    gain = sum(row.prediction != row.label for row in base) / 500
    low, high = bootstrap(base, perfect, bootstrap_samples=20_000)["accuracy"]
    half = 1.96 * (gain * (1 - gain) / 500) ** 0.5
    assert low == pytest.approx(gain - half, abs=0.004)
    assert high == pytest.approx(gain + half, abs=0.004)


def test_bootstrap_is_paired() -> None:
    """Two models that differ on few questions have a far narrower interval than two that err independently."""
    base = model(0.7, 1)
    almost = [row._replace(prediction=row.label) if i < 20 else row for i, row in enumerate(base)]

    def width(rows: list[Prediction]) -> float:
        low, high = bootstrap(base, rows)["accuracy"]
        return high - low

    assert width(almost) < width(model(0.7, 2)) / 3


def test_bootstrap_depends_on_its_seed_alone() -> None:
    base, tuned = model(0.5, 1), model(0.6, 2)
    assert bootstrap(base, tuned, seed=3, confidence=0.9) == bootstrap(base, tuned, seed=3, confidence=0.9)
    assert bootstrap(base, tuned, seed=3, confidence=0.9) != bootstrap(base, tuned, seed=4, confidence=0.9)


@pytest.mark.parametrize(("gained", "lost"), [(40, 20), (12, 4), (60, 50), (10, 30)])
def test_so_many_questions_find_the_difference_four_times_in_five(gained: int, lost: int) -> None:
    needed = compare.questions_needed(gained, lost, 500, 0.95)
    assert needed
    shares = [gained / 500, lost / 500, 1 - (gained + lost) / 500]
    drawn = np.random.default_rng(0).multinomial(needed, shares, size=20_000)
    difference = (drawn[:, 0] - drawn[:, 1]) / needed
    error = np.sqrt(((drawn[:, 0] + drawn[:, 1]) / needed - difference**2) / needed)
    assert (np.abs(difference) > 1.96 * error).mean() == pytest.approx(0.8, abs=0.025)


def test_one_question_tells_models_apart_of_which_one_is_always_right_and_the_other_never() -> None:
    assert compare.questions_needed(10, 0, 10, 0.95) == 1


def test_no_number_of_questions_tells_equal_models_apart() -> None:
    assert compare.questions_needed(7, 7, 500, 0.95) is None
    assert "questions_needed" not in compare.difference(model(0.5, 1), model(0.5, 1), PARAMS)


def test_a_difference_counted_by_hand() -> None:
    gold = ["yes", "yes", "no", "no", "maybe"]
    base = [
        row._replace(prediction=p) for row, p in zip(model(1, 0, gold), ["yes", "no", "yes", "yes", "yes"], strict=True)
    ]
    tuned = [row._replace(prediction=p) for row, p in zip(base, ["no", "yes", "no", "no", "yes"], strict=True)]
    figures = compare.compare({"chat": base}, {"chat": tuned}, {}, PARAMS)
    assert (figures["base_accuracy"], figures["tuned_accuracy"]) == (0.2, 0.6)
    found = {name.removeprefix("tuned_minus_base_"): value for name, value in figures.items()}
    assert (found["accuracy"], found["lost"], found["gained"], found["changed"]) == (0.4, 1, 3, 4)
    assert found["mcnemar_p"] == 0.625
    assert found["accuracy_low"] <= 0.4 <= found["accuracy_high"]
    assert figures["tuned_recall_maybe"] == 0
    assert all(isinstance(value, int | float) for value in figures.values())


def test_the_rate_of_unparsable_answers_is_that_of_the_protocol_that_asks_for_one() -> None:
    rows = model(1, 0, ["yes", "no", "maybe", "yes"])
    silent = [row._replace(greedy="") for row in rows]
    wordy = [rows[0]._replace(greedy="unparsable"), *rows[1:]]
    tables = {"base": {"chat": rows, "lm_eval": silent}, "tuned": {"chat": wordy, "lm_eval": silent}}
    figures = compare.compare(tables["base"], tables["tuned"], {}, PARAMS)
    rates = {name: value for name, value in figures.items() if "unparsable" in name}
    assert rates == {"base_unparsable_rate": 0, "tuned_unparsable_rate": 0.25}
    assert {"base_lm_eval_accuracy", "tuned_lm_eval_accuracy", "base_chat_accuracy"} <= figures.keys()
    assert "tuned_chat_accuracy" not in figures  # it is tuned_accuracy


def test_divergence_is_kl_from_the_reference_and_the_share_of_equal_top_tokens() -> None:
    reference = [answered("yes", 0.7, 0.2, 0.1), answered("yes", 0.4, 0.35, 0.25)]
    other = [answered("yes", 0.5, 0.3, 0.2), answered("yes", 0.4, 0.35, 0.25)._replace(top_token=8)]
    found = compare.divergence(reference, other)
    assert found["kl"] == pytest.approx(float(entropy([0.7, 0.2, 0.1], [0.5, 0.3, 0.2])) / 2)
    assert found["same_top_token"] == 0.5
    assert compare.divergence(reference, reference) == {"kl": 0, "same_top_token": 1}


def test_the_base_is_credited_with_the_better_of_its_two_protocols_and_never_with_a_third() -> None:
    chat, lm_eval, blind = model(0.5, 1), model(0.7, 2), model(0.9, 3)
    assert compare.headline({"chat": chat, "lm_eval": lm_eval, "question_only": blind}) is lm_eval
    assert compare.headline({"chat": lm_eval, "lm_eval": chat}) is lm_eval
    assert compare.headline({"chat": chat}) is chat
    figures = compare.compare({"chat": chat, "lm_eval": lm_eval}, {"chat": model(0.8, 4)}, {}, PARAMS)
    assert figures["base_accuracy"] == figures["base_lm_eval_accuracy"] > figures["base_chat_accuracy"]


def test_three_models_make_three_differences_and_two_make_one() -> None:
    base, merged, tuned = ({"chat": model(share, seed)} for share, seed in ((0.5, 1), (0.8, 2), (0.79, 2)))
    figures = compare.compare(base, tuned, merged, PARAMS)
    pairs = {"tuned_minus_base", "merged_minus_base", "tuned_minus_merged"}
    assert {name.split("_accuracy")[0] for name in figures if "_minus_" in name and "_accuracy" in name} == pairs
    assert {"tuned_minus_merged_kl", "tuned_minus_merged_same_top_token", "merged_brier"} <= figures.keys()
    assert figures["tuned_minus_merged_accuracy"] == pytest.approx(
        figures["tuned_minus_base_accuracy"] - figures["merged_minus_base_accuracy"]
    )
    alone = compare.compare(base, tuned, {}, PARAMS)
    assert alone == {name: value for name, value in figures.items() if "merged" not in name}


@pytest.mark.parametrize("change", [{"pmid": "9"}, {"label": "maybe"}])
@pytest.mark.parametrize("which", ["base", "merged"])
def test_tables_of_other_questions_or_labels_are_refused(change: dict[str, str], which: str) -> None:
    rows = model(1, 0, ["yes", "no"])
    tables = {name: {"chat": rows} for name in ("base", "tuned", "merged")}
    tables[which] = {"chat": [rows[0], rows[1]._replace(**change)]}
    with pytest.raises(Fail, match="PMID"):
        compare.compare(tables["base"], tables["tuned"], tables["merged"], PARAMS)


@pytest.mark.parametrize(
    ("difference", "low", "high", "words"),
    [
        (0.1, 0.05, 0.15, ": more than noise, the tuned model is better."),
        (0.1, 0.005, 0.15, ": more than noise, the tuned model is better."),
        (-0.1, -0.15, -0.05, ": more than noise, the tuned model is worse."),
        (0.02, -0.02, 0.06, ": no more than noise. About 1,234 questions would tell a difference of this size."),
        (0.02, 0.0, 0.06, ": no more than noise. About 1,234 questions would tell a difference of this size."),
        (-0.02, -0.06, 0.0, ": no more than noise. About 1,234 questions would tell a difference of this size."),
    ],
)
def test_the_verdict_says_whether_it_is_noise(difference: float, low: float, high: float, words: str) -> None:
    prefix = "tuned_minus_base"
    figures = {f"{prefix}_accuracy{end}": v for end, v in (("", difference), ("_low", low), ("_high", high))}
    figures |= {f"{prefix}_mcnemar_p": 0.01, f"{prefix}_questions_needed": 1234, "confidence": 0.95, "questions": 500}
    sentence = compare.verdict(figures, "tuned", "base")
    assert sentence.endswith(words)
    assert f"{100 * difference:+.1f} points" in sentence


def test_results_name_what_was_measured() -> None:
    figures = compare.compare({"chat": model(0.5, 1)}, {"chat": model(0.8, 2)}, {}, PARAMS)
    figures |= {f"{name}_{score}": 0.5 for name in compare.TEXT_BASELINES for score in compare.MEASURES}
    rows = {name: row for name, *row in compare.results(figures)}
    assert list(rows) == ["tuned model", "untuned base", "TF-IDF + logistic regression", "majority label"]
    ends = figures["tuned_accuracy_low"], figures["tuned_accuracy_high"]
    assert rows["tuned model"] == pytest.approx([figures["tuned_accuracy"], *ends, figures["tuned_macro_f1"]], abs=1e-6)
    assert len(GOLD) == figures["questions"]
