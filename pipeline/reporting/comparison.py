"""What a run measured, metrics/compare.json, and what it says in words.

Figures in a group `renormalised` are over the probabilities of yes, no and maybe renormalised to sum to 1.
`outside_labels` is the probability that the three did not have before that.
"""

from pydantic import Field

from pipeline.models.memory import CARDS
from pipeline.scoring.base_protocol import Choice
from pipeline.scoring.measures import MUCH, ByLabel, Figures, Interval
from pipeline.sections.evaluate import ProtocolName

TUNED, MERGED, BASE = "tuned model", "tuned model at 16 bits", "untuned base"
TFIDF, MAJORITY = "TF-IDF + logistic regression", "majority label"
SMALL_SLICE = 30  # questions; under this, an accuracy says little
SIMULATED = "The data are simulated: these numbers are not medical accuracy."
OVERLAP = (
    "ROUGE-L measures overlap with the words of the abstract's authors. Overlap is not correctness: a sentence that "
    "says the opposite can differ in one word."
)
NO_RELEASE = "A rehearsal with random weights: these numbers mean nothing, and nothing is released."


class Quality(Figures):  # of decisions; accuracy has Wilson's interval
    accuracy: Interval
    macro_f1: float


class Decisions(Quality):  # of a language model under one protocol
    recall: ByLabel[float]
    outside_labels: float


class Renormalised(Figures):
    brier: float
    calibration_error: float
    risk_coverage_area: float


class Model(Decisions):  # under its headline protocol: chat, or for the base `Subject.base_protocol`
    renormalised: Renormalised
    unparsable: float | None = None  # share of the greedy answers under chat that give no decision
    protocols: dict[ProtocolName, Decisions]  # the other protocols


class Difference(Figures):
    """One model minus another on the same questions, with paired bootstrap intervals."""

    accuracy: Interval
    macro_f1: Interval
    recall: ByLabel[Interval]
    mcnemar_p: float
    gained: int  # questions that only the first-named model gets right
    lost: int  # questions that only the other one gets right
    changed: int  # questions with different decisions
    questions_needed: int | None = None


class Divergence(Figures):
    kl_merged_to_tuned: float  # mean KL(merged || tuned), in nats


class Quantization(Difference):  # the quantized model minus the 16-bit one
    renormalised: Divergence
    same_top_token: float  # share of the questions with the same most probable next token


class Slice(Figures):  # accuracy on some of the questions, with Wilson's interval
    questions: int
    few: bool  # fewer than SMALL_SLICE
    accuracy: Interval


class Written(Figures):
    """The whole answers that a model wrote to the test questions; intervals are of the mean over questions."""

    rouge_l: Interval  # against LONG_ANSWER
    ended: float  # share that an end of turn ended, not the limit of tokens
    whole: float  # share that in addition ends as a sentence does
    tokens: float  # mean


class Answers(Figures):
    """Overlap with the authors' words, which is not correctness."""

    tuned: Written
    base: Written
    tuned_minus_base: Interval  # of rouge_l, paired


class File(Figures):
    bytes: int
    sha256: str


class Vram(Figures):
    """MiB on a card that holds the file whole, loaded as RUN.md says: computed, without context and desktop."""

    tokens_2048: float
    tokens_8192: float


class FileChoice(File):
    """One of the GGUF files, under the protocol chat."""

    path: str  # from models
    accuracy: Interval
    changed: int | None = None  # decisions, against 16 bits
    kl: float | None = None  # against 16 bits, as in Quantization
    vram_mib: Vram | None = None
    card_gb: int | None = None  # the smallest card that holds it whole with 2,048 tokens


class Subject(Figures):
    """What was compared: everything in metrics/compare.json that does not come from predictions."""

    data: str  # name of the data set
    simulated: bool
    rehearsal: bool  # whether the base's weights are random
    gguf: File
    base_protocol: Choice
    tfidf: Quality
    majority: Quality
    answers: Answers | None = None  # None if `generate` is off


class Comparison(Subject):
    """metrics/compare.json."""

    questions: int
    confidence: float  # of all intervals
    chat_version: int  # of the protocol chat: comparisons of two versions mean nothing
    tuned: Model
    base: Model
    merged: Model | None = None
    tuned_minus_base: Difference
    merged_minus_base: Difference | None = None
    tuned_minus_merged: Quantization | None = None
    slices: dict[str, dict[str, Slice]]  # of the tuned model: kind of slice, then its value
    files: dict[str, FileChoice] = Field(default_factory=dict)  # by type


def models(comparison: Comparison) -> dict[str, Model]:
    """Name -> language model, the tuned one first."""
    merged = {MERGED: comparison.merged} if comparison.merged else {}
    return {TUNED: comparison.tuned, **merged, BASE: comparison.base}


def results(comparison: Comparison) -> dict[str, Quality]:
    """Name -> model or text baseline, the tuned model first."""
    return {**models(comparison), TFIDF: comparison.tfidf, MAJORITY: comparison.majority}


def note(comparison: Comparison) -> str:
    """What the data are, in one sentence."""
    return NO_RELEASE if comparison.rehearsal else SIMULATED if comparison.simulated else f"Data: {comparison.data}."


def points(interval: Interval) -> str:
    """A difference of shares in percentage points with its interval, such as +1.2 (-0.3 to +2.7)."""
    value, low, high = (f"{100 * share:+z.1f}" for share in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def p_value(p: float) -> str:
    """A p-value in words; metrics round one that is smaller to 0."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def verdict(comparison: Comparison, difference: Difference, first: str, other: str) -> str:
    """The difference `first` minus `other` in accuracy, and whether it can be told from noise."""
    interval = difference.accuracy
    noise = interval.low <= 0 <= interval.high
    better = f"the {first} is {'better' if interval.low > 0 else 'worse'}"
    needed = difference.questions_needed if noise else None
    more = f" To detect a difference of this size with 80 % power takes about {needed:,} questions." if needed else ""
    return (
        f"{first.capitalize()} minus {other}: {points(interval)} points of accuracy on {comparison.questions} "
        f"questions ({comparison.confidence:.0%} interval; McNemar's exact test, {p_value(difference.mcnemar_p)}): "
        f"{'not distinguishable from noise' if noise else better}.{more}"
    )


def listed(comparison: Comparison) -> dict[str, FileChoice]:
    """Type -> file, the headline first: JSON keeps no order."""
    return dict(sorted(comparison.files.items(), key=lambda item: ("/" in item[1].path, -item[1].bytes)))


def best(files: dict[str, FileChoice]) -> str:
    """The file that is closest to 16 bits; the largest, if that was not measured."""
    return min(files, key=lambda name: (files[name].kl or 0, -files[name].bytes))


def advice(comparison: Comparison) -> str:
    """Which file is for whom, in one sentence; nothing if no card's size is known."""
    by_card = {card: {n: f for n, f in comparison.files.items() if f.card_gb and f.card_gb <= card} for card in CARDS}
    chosen = {card: best(fitting) for card, fitting in by_card.items() if fitting}
    if not chosen:
        return ""
    cards = {name: [card for card, other in chosen.items() if other == name] for name in dict.fromkeys(chosen.values())}
    parts = [f"{name} on a card of {min(sizes)} GB" for name, sizes in cards.items()]
    without = best(comparison.files)
    # A larger file may fit none of these cards.
    end = " or more, and without a card" if chosen[max(chosen)] == without else f"; without a card {without}"
    return f"Take {'; '.join(parts)}{end}, in main memory."


def warnings(comparison: Comparison) -> list[str]:
    """A sentence for each model that knows one answer alone, or that would rather begin with another word."""
    found: list[str] = []
    for name, model in models(comparison).items():
        recalls = {label: value for label, value in model.recall.model_dump().items() if value > 0}
        if len(recalls) == 1:
            found.append(f"The {name} is right only where the answer is {min(recalls)}.")
    return found + [
        f"The {name} gives {model.outside_labels:.0%} of the probability of its first word to words other than yes, no "
        "and maybe: it usually starts its answer with one of those others, and its accuracy is that of the most "
        "probable of yes, no and maybe."
        for name, model in models(comparison).items()
        if model.outside_labels > MUCH
    ]
