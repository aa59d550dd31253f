"""One model's calibration and two models on the same questions: counted by hand, against libraries, by simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, entropy

from pipeline.core.errors import Fail
from pipeline.core.facts import QuestionFacts
from pipeline.core.labels import LABELS, Label
from pipeline.reporting import compare as c
from pipeline.reporting.comparison import BASE, TUNED, Comparison, verdict, warnings
from pipeline.reporting.slices import slices
from pipeline.scoring.base_protocol import choose
from pipeline.scoring.measures import Interval, rounded, wilson
from pipeline.scoring.predictions import Prediction, Predictions
from pipeline.sections.evaluate import ProtocolName
from pipeline.sections.report import Report
from tests.tables import CHOICE, REPORT, SUBJECT, answered, facts, model


def given(gold: Label, *probabilities: float) -> Prediction:
    """A question with these probabilities of yes, no and maybe, halved: scoring must leave a common factor out."""
    yes, no, maybe = (math.log(p / 2) for p in probabilities)
    label = LABELS[int(np.argmax(probabilities))]
    return Prediction("chat", "1", gold, (yes, no, maybe), label, label, 7)


def compare(base: Predictions, tuned: Predictions, merged: Predictions | None = None) -> Comparison:
    return c.compare(SUBJECT, base, tuned, merged or {}, facts(tuned["chat"]), REPORT)


# One model


def test_probabilities_are_renormalised_over_the_three_labels_even_where_they_underflow() -> None:
    tiny = Prediction("chat", "2", "no", (-800.0, -801.0, -900.0), "yes", "yes", 7)
    rows = [given("yes", 0.5, 0.25, 0.25), tiny]
    assert np.exp(c.log_shares(rows)).sum(axis=1) == pytest.approx(1)
    assert c.probability_of_gold(rows) == pytest.approx([0.5, 1 / (1 + math.e)])


def test_brier_counted_by_hand() -> None:
    assert c.brier([given("yes", 0.5, 0.25, 0.25)]) == pytest.approx(0.25 + 0.0625 + 0.0625)
    assert c.brier([given("no", 1 - 2e-12, 1e-12, 1e-12)]) == pytest.approx(2)


def test_calibration_error_and_its_bins_counted_by_hand() -> None:
    rows = [
        given("yes", 0.45, 0.35, 0.2),  # bin 0.4 to 0.5: right
        given("no", 0.41, 0.39, 0.2),  # the same bin: wrong
        given("yes", 0.92, 0.04, 0.04),  # 0.9 to 1: right
        given("maybe", 1, 1e-30, 1e-30),  # a probability of 1 belongs to the last bin: wrong
    ]
    low, high = c.reliability(rows, 10)
    assert low == pytest.approx((0.4, 0.5, 2, 0.43, 0.5))
    assert high == pytest.approx((0.9, 1.0, 2, 0.96, 0.5))
    assert c.calibration_error(rows, 10) == pytest.approx((2 * abs(0.43 - 0.5) + 2 * abs(0.96 - 0.5)) / 4)


def test_risk_coverage_counted_by_hand_and_ties_share_their_risk() -> None:
    rows = [
        given("yes", 0.9, 0.05, 0.05),
        given("no", 0.6, 0.3, 0.1),  # wrong
        given("yes", 0.6, 0.3, 0.1),  # as sure, and right
        given("no", 0.5, 0.3, 0.2),  # wrong
    ]
    assert np.array(c.risk_coverage(rows)) == pytest.approx(np.array([(0.25, 0), (0.5, 0.25), (0.75, 1 / 3), (1, 0.5)]))
    assert c.risk_coverage(rows[::-1]) == c.risk_coverage(rows)


def test_slices_counted_by_hand() -> None:
    rows = [answered("1", "yes", "yes"), answered("2", "yes", "no"), answered("3", "maybe", "maybe")]
    about = {"1": (2004, 149, True), "2": (2005, 150, False), "3": (None, 900, True)}
    given_facts = [
        QuestionFacts(pmid=pmid, year=year, abstract_words=words, numeric_results=numeric)
        for pmid, (year, words, numeric) in about.items()
    ]
    found = slices(rows, given_facts, 0.95)
    assert {kind: {v: (s.questions, s.accuracy.value) for v, s in of.items()} for kind, of in found.items()} == {
        "label": {"yes": (2, 0.5), "maybe": (1, 1)},
        "year": {"before 2005": (1, 1), "2005 to 2009": (1, 0), "unknown": (1, 1)},
        "abstract_words": {"0 to 149": (1, 1), "150 to 199": (1, 0), "250 or more": (1, 1)},
        "numeric_results": {"present": (2, 1), "absent": (1, 0)},
    }
    assert found["label"]["yes"].accuracy == wilson(1, 2, 0.95)
    with pytest.raises(Fail, match="PMID 3"):
        slices(rows, given_facts[:2], 0.95)


@pytest.mark.parametrize(("questions", "few"), [(29, True), (30, False)])
def test_a_slice_of_few_questions_is_marked(questions: int, few: bool) -> None:
    rows = [answered(str(number), "yes", "yes") for number in range(questions)]
    assert slices(rows, facts(rows), 0.95)["label"]["yes"].few == few


# Two models


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1), (5, 5, 1), (5, 0, 0.0625), (9, 1, 0.021484375)])
def test_mcnemar_is_the_exact_two_sided_binomial_test(gained: int, lost: int, p: float) -> None:
    assert c.mcnemar(gained, lost) == c.mcnemar(lost, gained) == pytest.approx(p)


def test_a_difference_counted_by_hand() -> None:
    gold: list[Label] = ["yes", "yes", "no", "no", "maybe"]
    answers: dict[str, list[Label]] = {
        "base": ["yes", "no", "yes", "yes", "yes"],
        "tuned": ["no", "yes", "no", "no", "yes"],
    }
    base, tuned = ([answered(str(i), g, a) for i, (g, a) in enumerate(zip(gold, answers[n]))] for n in answers)  # noqa: B905
    found = c.difference(base, tuned, REPORT)
    assert (found.lost, found.gained, found.changed, found.mcnemar_p) == (1, 3, 4, 0.625)
    assert found.accuracy.value == pytest.approx(0.4)
    assert [found.recall.yes.value, found.recall.no.value, found.recall.maybe.value] == [0, 1, 0]
    assert found.accuracy.low <= 0.4 <= found.accuracy.high


def test_differences_come_from_unrounded_scores() -> None:
    compared = compare({"chat": model(0.5, 1)}, {"chat": model(0.8, 2)})
    exact = compared.tuned.macro_f1 - compared.base.macro_f1
    assert compared.tuned_minus_base.macro_f1.value == pytest.approx(exact, abs=1e-12)
    assert rounded(compared)["tuned_minus_base"]["macro_f1"]["value"] == round(exact, 6)


def test_bootstrap_of_a_sure_gain_is_its_binomial_interval_and_of_equal_models_zero_wide() -> None:
    base, perfect = model(0.5, 1), model(1.0, 1)
    assert c.difference(base, base, REPORT).accuracy == Interval(value=0, low=0, high=0)
    found = c.difference(base, perfect, REPORT.model_copy(update={"bootstrap_samples": 20_000})).accuracy
    half = 1.96 * (found.value * (1 - found.value) / 500) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.004)


def test_bootstrap_is_paired() -> None:
    """Models that differ on few questions have a far narrower interval than models that err independently."""
    base = model(0.7, 1)
    almost = [row._replace(prediction=row.label) if i < 20 else row for i, row in enumerate(base)]

    def width(rows: list[Prediction]) -> float:
        found = c.difference(base, rows, REPORT).macro_f1
        return found.high - found.low

    assert width(almost) < width(model(0.7, 2)) / 3


def test_bootstrap_depends_on_its_seed_alone() -> None:
    def found(seed: int) -> Interval:
        params = Report(bootstrap_samples=1000, seed=seed, confidence=0.9, bins=10)
        return c.difference(model(0.5, 1), model(0.6, 2), params).macro_f1

    assert found(3) == found(3) != found(4)


@pytest.mark.parametrize(("gained", "lost"), [(257, 25), (60, 35), (12, 4), (10, 30), (25, 0)])
def test_questions_needed_reach_a_power_of_80_percent_in_simulated_exact_tests(gained: int, lost: int) -> None:
    needed = c.questions_needed(gained, lost, 500, 0.95)
    assert needed

    def simulated(questions: int) -> float:
        shares = [gained / 500, lost / 500, 1 - (gained + lost) / 500]
        drawn = np.random.default_rng(0).multinomial(questions, shares, size=20_000)[:, :2]
        pairs, times = np.unique(drawn, axis=0, return_counts=True)
        p = [float(binomtest(int(a), int(a + b)).pvalue) if a + b else 1.0 for a, b in pairs]
        return float(times[np.array(p) < 0.05].sum() / 20_000)

    assert c.power(needed, (gained + lost) / 500, gained / (gained + lost), 0.05) >= c.POWER
    assert simulated(needed) == pytest.approx(c.POWER, abs=0.01)
    assert simulated(needed - max(2, needed // 10)) < c.POWER


def test_no_number_of_questions_tells_equal_models_apart() -> None:
    assert c.questions_needed(7, 7, 500, 0.95) is None
    assert c.questions_needed(100_001, 100_000, 1_000_000, 0.95) is None  # beyond the largest sample considered


def test_divergence_is_kl_from_the_16_bit_to_the_quantized_model() -> None:
    merged = [given("yes", 0.7, 0.2, 0.1), given("yes", 0.4, 0.35, 0.25)]
    tuned = [given("yes", 0.5, 0.3, 0.2), given("yes", 0.4, 0.35, 0.25)._replace(top_token=8)]
    found = c.quantization(merged, tuned, REPORT)
    assert found.renormalised.kl_merged_to_tuned == pytest.approx(float(entropy([0.7, 0.2, 0.1], [0.5, 0.3, 0.2])) / 2)
    assert found.same_top_token == 0.5


# All models


@pytest.mark.parametrize(
    ("right", "chosen"),
    [((0.5, 0.7, 0.9), "lm_eval"), ((0.7, 0.5, 0.9), "chat"), ((1, 1, 1), "chat"), ((0.5,), "chat")],
    ids=["better lm_eval", "better chat", "a tie", "chat alone"],
)
def test_the_better_of_chat_and_lm_eval_on_validation_is_chosen(right: tuple[float, ...], chosen: str) -> None:
    names: tuple[ProtocolName, ...] = ("chat", "lm_eval", "question_only")
    tables: Predictions = {name: model(share, 1)[:50] for name, share in zip(names, right, strict=False)}
    choice = choose(tables, 0.95)
    assert (choice.chosen, choice.questions) == (chosen, 50)
    assert choice.accuracy.keys() == tables.keys() - {"question_only"}


def test_the_base_is_credited_with_the_chosen_protocol_even_if_another_is_better_on_the_test() -> None:
    subject = SUBJECT.model_copy(update={"base_protocol": CHOICE})
    base: Predictions = {"chat": model(0.7, 1), "lm_eval": model(0.5, 2)}
    compared = c.compare(subject, base, {"chat": model(0.8, 4)}, {}, facts(base["chat"]), REPORT)
    assert (compared.base_protocol, list(compared.base.protocols)) == (CHOICE, ["chat"])
    assert compared.base.accuracy.value < compared.base.protocols["chat"].accuracy.value
    assert compared.base.unparsable == 0  # under chat, the only protocol with written answers


def test_three_models_make_three_differences_and_two_make_one() -> None:
    base, merged, tuned = (Predictions({"chat": model(share, seed)}) for share, seed in ((0.5, 1), (0.8, 2), (0.79, 2)))
    compared = compare(base, tuned, merged)
    assert compared.tuned_minus_merged
    assert compared.merged_minus_base
    assert compared.tuned_minus_merged.accuracy.value == pytest.approx(
        compared.tuned_minus_base.accuracy.value - compared.merged_minus_base.accuracy.value
    )
    without = rounded(compared)
    for key in ("merged", "merged_minus_base", "tuned_minus_merged"):
        del without[key]
    assert rounded(compare(base, tuned)) == without


def test_the_file_is_a_comparison_again() -> None:
    written = rounded(compare({"chat": model(0.5, 1)}, {"chat": model(0.8, 2)}))
    assert rounded(Comparison.model_validate(written)) == written


@pytest.mark.parametrize("change", [{"pmid": "9"}, {"label": "maybe"}])
@pytest.mark.parametrize("which", ["base", "merged"])
def test_tables_of_other_questions_or_labels_are_refused(change: dict[str, str], which: str) -> None:
    rows = model(1, 0, ["yes", "no"])
    tables: dict[str, Predictions] = {name: {"chat": rows} for name in ("base", "tuned", "merged")}
    tables[which] = {"chat": [rows[0], rows[1]._replace(**change)]}
    with pytest.raises(Fail, match="PMID"):
        compare(**tables)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.005, 0.15, "is better"), (-0.15, -0.05, "is worse"), (-0.02, 0.06, "1,234"), (0, 0.06, "noise")],
)
def test_the_verdict_says_whether_it_is_noise_and_what_would_tell(low: float, high: float, words: str) -> None:
    compared = compare({"chat": model(0.5, 1)}, {"chat": model(0.8, 2)})
    changes = {"accuracy": Interval(value=(low + high) / 2, low=low, high=high), "questions_needed": 1234}
    found = compared.tuned_minus_base.model_copy(update=changes)
    sentence = verdict(compared, found, TUNED, BASE)
    assert words in sentence
    assert ("1,234" in sentence) == (low <= 0 <= high)


def test_a_model_that_knows_one_answer_alone_is_named() -> None:
    always = [row._replace(log_probabilities=(-0.2, -3.0, -3.0), prediction="yes") for row in model(0.5, 1)]
    assert warnings(compare({"chat": always}, {"chat": model(0.8, 2)})) == [
        f"The {BASE} is right only where the answer is yes."
    ]


def test_a_model_that_usually_starts_with_another_word_is_named() -> None:
    rare = [row._replace(log_probabilities=tuple(s - 3 for s in row.log_probabilities)) for row in model(0.5, 1)]
    (warning,) = warnings(compare({"chat": rare}, {"chat": model(0.8, 2)}))
    assert BASE in warning
    assert "96%" in warning  # all but exp(-3) of 0.88
