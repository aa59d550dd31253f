"""What tables of predictions say about models, and about one model against another on the same questions.

The questions are a sample, and all models answer the same ones, so a comparison is paired (Miller 2024, 'Adding Error
Bars to Evals', https://arxiv.org/abs/2411.00640). A label's probability is its share of the probability of the three.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.core.stage import Fail, Section
from pipeline.scoring.measures import (
    Floats,
    Prediction,
    Predictions,
    accuracy,
    cells,
    macro_f1,
    score,
    wilson,
)
from pipeline.scoring.protocols import LABELS

NAMES = {
    "tuned": "tuned model",
    "merged": "tuned model at 16 bits",
    "base": "untuned base",
    "tfidf": "TF-IDF + logistic regression",
    "majority": "majority label",
}
TEXT_BASELINES = ("tfidf", "majority")
MEASURES = ("accuracy", "macro_f1")
HEADLINES = ("chat", "lm_eval")  # the base is credited with the better of the two: it was trained for neither
POWER = 0.8  # the chance to find a difference that is there, when telling how many questions it would take
ROUND = 6  # decimals of a figure


class Params(Section):
    bootstrap_samples: Annotated[int, Field(ge=1000, le=1_000_000)]
    seed: int
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    bins: Annotated[int, Field(ge=2, le=50)]  # of the reliability diagram and of the expected calibration error


# One model: are its probabilities worth believing?


def log_shares(rows: list[Prediction]) -> Floats:
    """Logarithms of the labels' probabilities, shape (questions, 3), in the order of LABELS."""
    values = np.array([row.log_probabilities for row in rows])
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)


def probabilities(rows: list[Prediction]) -> Floats:
    """Probabilities of the labels, shape (questions, 3), in the order of LABELS, each line's sum 1."""
    return np.exp(log_shares(rows))


def of_gold(rows: list[Prediction]) -> Floats:
    """The probability that each question's right label got, shape (questions,)."""
    return probabilities(rows)[np.arange(len(rows)), [LABELS.index(row.label) for row in rows]]


def brier(rows: list[Prediction]) -> float:
    """Brier's score (1950): mean over questions of the summed squared error of the three probabilities; 0 to 2."""
    gold = np.array([[label == row.label for label in LABELS] for row in rows])
    return float(((probabilities(rows) - gold) ** 2).sum(axis=1).mean())


class Bin(NamedTuple):
    """Questions whose decision is equally sure: how sure on average, and how often it is right."""

    low: float
    high: float
    questions: int
    confidence: float
    accuracy: float


def reliability(rows: list[Prediction], bins: int) -> list[Bin]:
    """Questions by the probability of their decision, in bins of equal width from 0 to 1; without the empty ones."""
    sure = probabilities(rows).max(axis=1)
    right = np.array([row.prediction == row.label for row in rows])
    place = np.minimum((sure * bins).astype(int), bins - 1)
    found: list[Bin] = []
    for number in range(bins):
        if (inside := place == number).any():
            shares = float(sure[inside].mean()), float(right[inside].mean())
            found.append(Bin(number / bins, (number + 1) / bins, int(inside.sum()), *shares))
    return found


def expected_calibration_error(rows: list[Prediction], bins: int) -> float:
    """Mean distance between how sure and how often right, over bins (Guo et al. 2017, arXiv:1706.04599); 0 to 1."""
    return sum(b.questions * abs(b.confidence - b.accuracy) for b in reliability(rows, bins)) / len(rows)


def risk_coverage(rows: list[Prediction]) -> list[tuple[float, float]]:
    """(share of questions answered, share of those that are wrong), the surest answered first, a point a question.

    Selective prediction (Geifman & El-Yaniv 2017, arXiv:1705.08500): what abstaining from the rest buys. Questions that
    are equally sure are answered together, so that the curve does not depend on their order.
    """
    sure = probabilities(rows).max(axis=1)
    wrong = np.array([row.prediction != row.label for row in rows], dtype=float)
    _, group = np.unique(-sure, return_inverse=True)
    shared = (np.bincount(group, wrong) / np.bincount(group))[group]
    risk = np.cumsum(shared[np.argsort(group, kind="stable")]) / np.arange(1, len(rows) + 1)
    return [((number + 1) / len(rows), float(value)) for number, value in enumerate(risk)]


def believable(rows: list[Prediction], bins: int) -> dict[str, float]:
    """Brier's score, expected calibration error, and the area under the risk-coverage curve (its mean risk)."""
    return {
        "brier": brier(rows),
        "calibration_error": expected_calibration_error(rows, bins),
        "risk_coverage_area": float(np.mean([risk for _, risk in risk_coverage(rows)])),
    }


# Two models, the same questions


def check_same_questions(names: Sequence[str], first: list[Prediction], second: list[Prediction]) -> None:
    """Raise `Fail` unless both tables, sorted by PMID, hold the same questions with the same gold labels."""
    which = " and ".join(names)
    if apart := {row.pmid for row in first} ^ {row.pmid for row in second}:
        raise Fail(f"{which} answered different questions: PMID {min(apart)} is in one table only; run `dvc repro`")
    for one, other in zip(first, second, strict=True):
        if one.label != other.label:
            raise Fail(f"{which} were scored against different labels: PMID {one.pmid}; run `dvc repro`")


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test (1947): are the questions that one model alone gets right split evenly?"""
    from scipy.stats import binomtest  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    changed = only_first + only_second
    return float(binomtest(only_first, changed).pvalue) if changed else 1.0


def paired_bootstrap(
    first: list[Prediction], second: list[Prediction], params: Params
) -> dict[str, tuple[float, float]]:
    """Percentile intervals (Efron 1979) of second minus first, in accuracy and macro-F1, on the same questions.

    A question is drawn with both its predictions. Drawing questions with replacement is drawing the counts of the 27
    combinations of gold, first's and second's label from a multinomial distribution.
    """
    counts = cells([row.label for row in first], [row.prediction for row in first], [row.prediction for row in second])
    rng = np.random.default_rng(params.seed)
    draws = rng.multinomial(len(first), counts.ravel() / len(first), size=params.bootstrap_samples)
    drawn = draws.reshape(-1, *counts.shape)
    of_first, of_second = drawn.sum(axis=3), drawn.sum(axis=2)
    tails = [(1 - params.confidence) / 2, (1 + params.confidence) / 2]
    intervals: dict[str, tuple[float, float]] = {}
    for name, measure in {"accuracy": accuracy, "macro_f1": macro_f1}.items():
        low, high = np.quantile(measure(of_second) - measure(of_first), tails)
        intervals[name] = (float(low), float(high))
    return intervals


def questions_needed(gained: int, lost: int, questions: int, confidence: float) -> int | None:
    """How many questions would tell such a difference in accuracy from noise, with a chance of POWER; None for 0.

    The size of a paired sample (Miller 2024, section 5), its variance that of the difference seen here.
    """
    if gained == lost:
        return None
    difference = (gained - lost) / questions
    variance = (gained + lost) / questions - difference**2
    z = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(POWER)
    return max(math.ceil(variance * (z / difference) ** 2), 1)


def difference(first: list[Prediction], second: list[Prediction], params: Params) -> dict[str, float]:
    """Second minus first on the same questions, both sorted by PMID: flat and numeric."""
    right = [(a.prediction == a.label, b.prediction == b.label) for a, b in zip(first, second, strict=True)]
    lost, gained = right.count((True, False)), right.count((False, True))
    of_first, of_second = (score(rows, params.confidence) for rows in (first, second))
    figures: dict[str, float] = {}
    for name, (low, high) in paired_bootstrap(first, second, params).items():
        figures |= {name: of_second[name] - of_first[name], f"{name}_low": low, f"{name}_high": high}
    figures |= {
        "mcnemar_p": float(f"{mcnemar(lost, gained):.6g}"),
        "gained": gained,  # questions that the second alone gets right
        "lost": lost,
        "changed": sum(a.prediction != b.prediction for a, b in zip(first, second, strict=True)),
    }
    if needed := questions_needed(gained, lost, len(first), params.confidence):
        figures["questions_needed"] = needed
    return figures


def divergence(reference: list[Prediction], other: list[Prediction]) -> dict[str, float]:
    """What changed before any decision did: mean KL(reference || other) over the labels, in nats, and same top tokens.

    'Accuracy is not all you need' (Dutta et al. 2024, arXiv:2407.09141).
    """
    p, q = log_shares(reference), log_shares(other)
    same = [one.top_token == two.top_token for one, two in zip(reference, other, strict=True)]
    return {"kl": float((np.exp(p) * (p - q)).sum(axis=1).mean()), "same_top_token": sum(same) / len(same)}


def headline(base: Predictions) -> list[Prediction]:
    """The base's predictions under the protocol that it does better with."""
    asked = [base[name] for name in HEADLINES if name in base]
    return max(asked, key=lambda rows: sum(row.prediction == row.label for row in rows))


def compare(base: Predictions, tuned: Predictions, merged: Predictions, params: Params) -> dict[str, float]:
    """Each model's scores, and each difference that matters, flat and numeric, to six decimals."""
    models = {"base": headline(base), "tuned": tuned["chat"], **({"merged": merged["chat"]} if merged else {})}
    figures: dict[str, float] = {"questions": len(models["tuned"]), "confidence": params.confidence}
    for model, rows in models.items():
        check_same_questions([NAMES[model], NAMES["tuned"]], rows, models["tuned"])
        scores = score(rows, params.confidence) | believable(rows, params.bins)
        for name in ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "recall_maybe"):
            figures[f"{model}_{name}"] = scores[name]
        for name in ("brier", "calibration_error", "risk_coverage_area"):
            figures[f"{model}_{name}"] = scores[name]
    for model, tables in {"base": base, "tuned": tuned}.items():
        for protocol, rows in tables.items():
            scores = score(rows, params.confidence)
            if protocol == "chat":
                figures[f"{model}_unparsable_rate"] = scores["unparsable_rate"]
            if (model, protocol) != ("tuned", "chat"):
                for name in ("accuracy", "macro_f1", "recall_maybe"):
                    figures[f"{model}_{protocol}_{name}"] = scores[name]
    pairs = [("base", "tuned"), *([("base", "merged"), ("merged", "tuned")] if merged else [])]
    for first, second in pairs:
        found = difference(models[first], models[second], params)
        if first == "merged":
            found |= divergence(models[first], models[second])
        figures |= {f"{second}_minus_{first}_{name}": value for name, value in found.items()}
    return {name: value if name.endswith("_p") else round(value, ROUND) for name, value in figures.items()}


def verdict(figures: dict[str, float], second: str, first: str) -> str:
    """The difference in accuracy in a sentence or two: whether it can be told from noise, and what would tell it."""
    prefix = f"{second}_minus_{first}"
    value, low, high = (100 * figures[f"{prefix}_accuracy{end}"] for end in ("", "_low", "_high"))
    noise = low <= 0 <= high
    told = (
        "no more than noise" if noise else f"more than noise, the {NAMES[second]} is {'better' if low > 0 else 'worse'}"
    )
    needed = figures.get(f"{prefix}_questions_needed")
    more = f" About {needed:,.0f} questions would tell a difference of this size." if noise and needed else ""
    return (
        f"{NAMES[second].capitalize()} minus {NAMES[first]}: {value:+.1f} points of accuracy "
        f"({figures['confidence']:.0%} interval {low:+.1f} to {high:+.1f}; McNemar's exact p "
        f"{figures[f'{prefix}_mcnemar_p']:.2g}) on {figures['questions']:.0f} questions: {told}.{more}"
    )


def results(figures: dict[str, float]) -> list[tuple[str, float, float, float, float]]:
    """Name, accuracy, its interval's ends and macro-F1 of each model and baseline, the tuned model first."""
    rows: list[tuple[str, float, float, float, float]] = []
    for key, name in NAMES.items():
        if f"{key}_accuracy" in figures:
            share, questions = figures[f"{key}_accuracy"], int(figures["questions"])
            low, high = wilson(round(share * questions), questions, figures["confidence"])
            rows.append((name, share, low, high, figures[f"{key}_macro_f1"]))
    return rows
