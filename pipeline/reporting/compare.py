"""Predictions -> one model's calibration, and the difference of two models on the same questions.

The questions are a sample and all models answer the same ones, so every comparison is paired (Miller 2024, 'Adding
Error Bars to Evals', https://arxiv.org/abs/2411.00640). Probabilities here are those of yes, no and maybe renormalised
to sum to 1.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from pipeline.core.errors import Fail
from pipeline.core.facts import QuestionFacts
from pipeline.core.labels import LABELS
from pipeline.models.gguf_header import Header
from pipeline.models.memory import CARDS, GIB, MIB, RESERVED, Shape, gguf_vram, small_load
from pipeline.reporting.comparison import (
    Comparison,
    Decisions,
    Difference,
    Divergence,
    File,
    FileChoice,
    Model,
    Quantization,
    Renormalised,
    Subject,
    Vram,
)
from pipeline.reporting.slices import slices
from pipeline.scoring import measures
from pipeline.scoring.measures import ByLabel, Counts, Floats, Interval, cells, score
from pipeline.scoring.predictions import Prediction, Predictions
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.sections.evaluate import ProtocolName
from pipeline.sections.report import Report

POWER = 0.8
LARGEST = 1_000_000  # the largest sample that `questions_needed` considers


def log_shares(rows: list[Prediction]) -> Floats:
    """Logarithms of the labels' renormalised probabilities, shape (questions, 3), in the order of LABELS."""
    values = np.array([row.log_probabilities for row in rows])
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)


def confidence_and_right(rows: list[Prediction]) -> tuple[Floats, Floats]:
    """Probability of the predicted label, and 1 where it is the gold label or else 0; both of shape (questions,)."""
    right = np.array([row.prediction == row.label for row in rows], dtype=float)
    return np.exp(log_shares(rows)).max(axis=1), right


def probability_of_gold(rows: list[Prediction]) -> Floats:
    """The gold label's renormalised probability, shape (questions,)."""
    return np.exp(log_shares(rows))[np.arange(len(rows)), [LABELS.index(row.label) for row in rows]]


def brier(rows: list[Prediction]) -> float:
    """Brier score (1950): mean over questions of the summed squared error of the three probabilities, 0 to 2."""
    gold = np.array([[label == row.label for label in LABELS] for row in rows])
    return float(((np.exp(log_shares(rows)) - gold) ** 2).sum(axis=1).mean())


class Bin(NamedTuple):
    """Questions whose predicted labels have probabilities from `low` to `high`."""

    low: float
    high: float
    questions: int
    confidence: float  # mean probability of the predicted label
    accuracy: float


def reliability(rows: list[Prediction], bins: int) -> list[Bin]:
    """The non-empty ones of `bins` bins of equal width from 0 to 1."""
    confidence, right = confidence_and_right(rows)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        Bin(n / bins, (n + 1) / bins, int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        for n in range(bins)
        if (inside := place == n).any()
    ]


def calibration_error(rows: list[Prediction], bins: int) -> float:
    """Expected calibration error, 0 to 1 (Guo et al. 2017, https://arxiv.org/abs/1706.04599)."""
    return sum(b.questions * abs(b.confidence - b.accuracy) for b in reliability(rows, bins)) / len(rows)


def risk_coverage(rows: list[Prediction]) -> list[tuple[float, float]]:
    """(coverage, risk) after each question, the most confident first.

    Selective prediction (Geifman & El-Yaniv 2017, https://arxiv.org/abs/1705.08500): the share of questions that are
    answered, and the share of these that is wrong. Ties share their risk, so that order does not matter.
    """
    confidence, right = confidence_and_right(rows)
    _, group = np.unique(-confidence, return_inverse=True)
    shared = (np.bincount(group, 1 - right) / np.bincount(group))[np.sort(group)]
    answered = np.arange(1, len(rows) + 1)
    return list(zip((answered / len(rows)).tolist(), (np.cumsum(shared) / answered).tolist(), strict=True))


def decisions(rows: list[Prediction], confidence: float) -> Decisions:
    """Accuracy, macro-F1, recalls and `outside_labels` of the rows."""
    scores = score(rows, confidence)
    return Decisions(**{name: getattr(scores, name) for name in Decisions.model_fields})


def measured(tables: Predictions, headline: ProtocolName, params: Report) -> Model:
    """A model's figures under the protocol `headline`, and its decisions under the others."""
    rows, written = tables[headline], score(tables["chat"], params.confidence).written
    return Model(
        **dict(decisions(rows, params.confidence)),
        renormalised=Renormalised(
            brier=brier(rows),
            calibration_error=calibration_error(rows, params.bins),
            risk_coverage_area=float(np.mean([risk for _, risk in risk_coverage(rows)])),
        ),
        unparsable=written.unparsable if written else None,
        protocols={name: decisions(rows, params.confidence) for name, rows in tables.items() if name != headline},
    )


def check_same_questions(first: list[Prediction], second: list[Prediction], names: str) -> None:
    """Raise `Fail` unless both tables, sorted by PMID, hold the same questions with the same gold labels."""
    if apart := {row.pmid for row in first} ^ {row.pmid for row in second}:
        raise Fail(f"{names} answered different questions: PMID {min(apart)} is in one table only; run `dvc repro`")
    for one, other in zip(first, second, strict=True):
        if one.label != other.label:
            raise Fail(f"{names} were scored against different labels: PMID {one.pmid}; run `dvc repro`")


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test (1947): are the questions that one model alone gets right split evenly?"""
    from scipy.stats import binomtest

    return float(cast(Any, binomtest(lost, gained + lost)).pvalue) if gained + lost else 1.0


def power(questions: int, discordant: float, gained: float, alpha: float) -> float:
    """Power of McNemar's exact two-sided test at level `alpha`.

    The number of discordant pairs is binomial, `discordant` being its probability per question; of these pairs the
    share `gained` is on one side. Sums over the numbers of pairs, but for 1e-9 in each tail.
    """
    from scipy.stats import binom

    law = cast(Any, binom)
    low, high = law.ppf([1e-9, 1 - 1e-9], questions, discordant)
    pairs = np.arange(int(low), int(high) + 1)
    critical = law.ppf(alpha / 2, pairs, 0.5) - 1  # the test rejects up to here, and from pairs - critical
    rejects = law.cdf(critical, pairs, gained) + law.sf(pairs - critical - 1, pairs, gained)
    return float((law.pmf(pairs, questions, discordant) * rejects).sum())


def questions_needed(gained: int, lost: int, questions: int, confidence: float) -> int | None:
    """How many questions McNemar's exact test needs to detect such a difference with a power of POWER.

    None if as many were gained as lost, or if even LARGEST questions are too few.
    """
    if gained == lost:
        return None
    rates = (gained + lost) / questions, gained / (gained + lost)
    found = 1 + bisect_left(range(1, LARGEST + 1), POWER, key=lambda n: power(n, *rates, 1 - confidence))
    return found if found <= LARGEST else None


def difference(first: list[Prediction], second: list[Prediction], params: Report) -> Difference:
    """Second minus first on the same questions, both sorted by PMID.

    Intervals are those of the percentile bootstrap (Efron 1979) over questions. Drawing questions with replacement is
    drawing the counts of the 27 combinations of gold, first's and second's label from a multinomial distribution.
    """
    counts = cells([row.label for row in first], [row.prediction for row in first], [row.prediction for row in second])
    rng = np.random.default_rng(params.seed)
    draws = rng.multinomial(len(first), counts.ravel() / len(first), size=params.bootstrap_samples)
    # Axes are gold, first's and second's label, and before them the draw: the data themselves, then the samples.
    drawn = np.concatenate([counts[np.newaxis], draws.reshape(-1, *counts.shape)])

    def intervals(measure: Callable[[Counts], Floats]) -> list[Interval]:
        minus = (measure(drawn.sum(axis=-2)) - measure(drawn.sum(axis=-1))).reshape(len(drawn), -1)
        low, high = np.quantile(minus[1:], [(1 - params.confidence) / 2, (1 + params.confidence) / 2], axis=0)
        ends = zip(minus[0].tolist(), low.tolist(), high.tolist(), strict=True)
        return [Interval(value=value, low=low, high=high) for value, low, high in ends]

    both = int(np.einsum("iii->", counts))
    lost, gained = (int(np.trace(counts.sum(axis=axis))) - both for axis in (-1, -2))
    return Difference(
        accuracy=intervals(measures.accuracy)[0],
        macro_f1=intervals(measures.macro_f1)[0],
        recall=ByLabel[Interval].of(intervals(measures.recall)),
        mcnemar_p=mcnemar(gained, lost),
        gained=gained,
        lost=lost,
        changed=len(first) - int(np.einsum("gii->", counts)),
        questions_needed=questions_needed(gained, lost, len(first), params.confidence),
    )


def quantization(merged: list[Prediction], tuned: list[Prediction], params: Report) -> Quantization:
    """What quantization changed.

    'Accuracy is not all you need' (Dutta et al. 2024, https://arxiv.org/abs/2407.09141).
    """
    same = [one.top_token == other.top_token for one, other in zip(merged, tuned, strict=True)]
    return Quantization(
        **dict(difference(merged, tuned, params)),
        renormalised=Divergence(kl_merged_to_tuned=divergence(merged, tuned)),
        same_top_token=sum(same) / len(same),
    )


def divergence(merged: list[Prediction], tuned: list[Prediction]) -> float:
    """Mean KL(merged || tuned) over questions, in nats."""
    p, q = log_shares(merged), log_shares(tuned)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def file_choice(
    file: File, path: str, header: Header, rows: list[Prediction], merged: Predictions, params: Report
) -> FileChoice:
    """A row of the choice table, for predictions of one file under the protocol chat."""
    against: dict[str, Any] = {}
    if at_16_bits := merged.get("chat"):
        check_same_questions(at_16_bits, rows, f"merged model and {path}")
        changed = [one.prediction != other.prediction for one, other in zip(at_16_bits, rows, strict=True)]
        against = {"changed": sum(changed), "kl": divergence(at_16_bits, rows)}
    room = vram(header)
    return FileChoice(
        **dict(file),
        path=path,
        accuracy=score(rows, params.confidence).accuracy,
        **against,
        vram_mib=room,
        card_gb=next((card for card in CARDS if room and room.tokens_2048 * MIB <= card * GIB - RESERVED), None),
    )


def vram(header: Header) -> Vram | None:
    """What a GGUF takes on a card; None if it is not a dense model, for which alone the arithmetic holds."""
    try:
        shape = Shape.of_gguf(header)
    except KeyError:
        return None
    tokens = (gguf_vram(header.tensors, shape, small_load(n_ctx)) / MIB for n_ctx in (2048, 8192))
    return Vram(**dict(zip(Vram.model_fields, tokens, strict=True)))


def compare(
    subject: Subject,
    base: Predictions,
    tuned: Predictions,
    merged: Predictions,
    facts: Sequence[QuestionFacts],
    params: Report,
) -> Comparison:
    """Every model's figures and every difference, unrounded; `merged` is empty if it was not measured."""
    protocol = subject.base_protocol.chosen
    of_base, of_tuned, of_merged = base[protocol], tuned["chat"], merged.get("chat")
    check_same_questions(of_base, of_tuned, "base and tuned model")
    if of_merged:
        check_same_questions(of_merged, of_tuned, "merged and tuned model")
    return Comparison(
        **dict(subject),
        questions=len(of_tuned),
        confidence=params.confidence,
        chat_version=PROTOCOLS["chat"].version,
        tuned=measured(tuned, "chat", params),
        base=measured(base, protocol, params),
        merged=measured(merged, "chat", params) if of_merged else None,
        tuned_minus_base=difference(of_base, of_tuned, params),
        merged_minus_base=difference(of_base, of_merged, params) if of_merged else None,
        tuned_minus_merged=quantization(of_merged, of_tuned, params) if of_merged else None,
        slices=slices(of_tuned, facts, params.confidence),
    )
