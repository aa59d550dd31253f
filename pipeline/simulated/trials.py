"""Simulated trial abstracts in the schema of PubMedQA's PQA-L.

Nothing here is medicine: treatments, patients and numbers are drawn by `random.Random(seed)`, and a score on them
says nothing about medical accuracy. Every abstract reports its main outcome as higher or lower with the treatment,
with a P value, and names a second outcome; sizes, doses, ages and another P value distract. A question asks whether
the treatment moves the main outcome in a given direction:

- yes: the outcome went in that direction with P < 0.05;
- maybe: it went in that direction with 0.05 <= P < 0.10;
- no: P >= 0.10, or the outcome went in the other direction.

The test half shares no treatment, outcome, patients or wording with the training half (`SEEN`, `UNSEEN`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ruamel.yaml import YAML

Record = dict[str, object]  # in PQA-L's schema

SHARES = (276, 169)  # yes and no in 500, as in PubMedQA's official test set: 55.2 % and 33.8 %; the rest is maybe
FIRST_PMID = 900_000_000  # real PMIDs have 8 digits: a simulated one is never taken for a paper
# P values in thousandths: as a word each is rare, but its first two digits are a token that the tiny base knows.
LEVELS = {
    "yes": range(1, 50),
    "maybe": range(50, 100),
    "no": [p for p in range(120, 950) if p // 10 % 7 == 5],  # 12 first pairs: a tiny base learns to copy few numbers
}
OPPOSITE = 0.25  # share of the answers 'no' where the outcome went the other way; the rest have P >= 0.10
# Few distinct numbers, so that the tiny base meets each often enough to read and copy it.
SIZES = (24, 30, 36, 40, 45, 48, 60, 64, 72, 80, 90, 96)
WEEKS = (4, 6, 8, 12, 16, 20, 24, 30, 36, 40, 48, 52)
DOSES = (2, 4, 5, 8, 10, 12, 16, 20, 30, 40, 60, 80)
STATED = 0.75  # share of abstracts that state each of size, follow-up and dose
CHANGES = {-1: ("lower", "smaller"), 1: ("higher", "greater")}  # words of both sides of the split
VERBS = {-1: ("reduce", "lower", "decrease"), 1: ("increase", "raise", "worsen")}


@dataclass(frozen=True)
class Wording:
    """The words of one side of the split; braces name what `draw_abstract` and `_record` fill in."""

    stems: list[str]  # a treatment is a stem with an ending
    endings: list[str]
    comparators: list[str]
    sites: list[str]  # an outcome is a site with a symptom
    symptoms: list[str]
    patients: list[str]
    aims: list[str]
    designs: dict[str, list[str]]
    sizes: list[str]
    durations: list[str]
    doses: list[str]
    results: list[str]  # of the main outcome
    others: list[str]  # of the second outcome, which distracts
    reports: list[str]  # how a result gives its P value
    asides: list[str]  # sentences whose numbers distract
    questions: list[str]
    conclusions: dict[str, list[str]]


def wordings() -> tuple[Wording, Wording]:
    """The words of the training half and of the test half, from wordings.yaml."""
    halves: Any = YAML(typ="safe").load(Path(__file__).with_name("wordings.yaml"))  # pyright: ignore[reportUnknownMemberType]
    return Wording(**halves["seen"]), Wording(**halves["unseen"])


SEEN, UNSEEN = wordings()


@dataclass(frozen=True)
class Trial:
    """One simulated trial; a fact that the abstract does not state is None (the design: "")."""

    wording: Wording
    words: dict[str, str]  # T treatment, C comparator, patients, Y main outcome, Z second outcome
    direction: int  # of the main outcome with the treatment: -1 lower, 1 higher
    p: int  # its P value in thousandths
    design: str
    n: int | None
    weeks: int | None
    dose: int | None

    @property
    def level(self) -> str:
        """The answer to a question that asks for the direction that the outcome took."""
        return next(label for label, values in LEVELS.items() if self.p in values)


def draw_trial(rng: Random, wording: Wording, direction: int, label: str) -> Trial:
    """A trial with an outcome in `direction` at `label`'s level of significance."""
    sites, symptoms = rng.sample(wording.sites, 2), rng.sample(wording.symptoms, 2)
    words = {
        "T": rng.choice(wording.stems) + rng.choice(wording.endings),
        "C": rng.choice(wording.comparators),
        "patients": rng.choice(wording.patients),
        "Y": f"{sites[0]} {symptoms[0]}",
        "Z": f"{sites[1]} {symptoms[1]}",
    }

    def stated(values: tuple[int, ...]) -> int | None:
        return rng.choice(values) if rng.random() < STATED else None

    design = rng.choice(list(wording.designs))
    p = rng.choice(LEVELS[label])
    return Trial(wording, words, direction, p, design, stated(SIZES), stated(WEEKS), stated(DOSES))


def say(rng: Random, templates: Sequence[str], **words: object) -> str:
    """One of `templates` filled in, as a sentence."""
    sentence = rng.choice(templates).format(**words)
    return sentence[0].upper() + sentence[1:]


def draw_abstract(rng: Random, trial: Trial) -> dict[str, str]:
    """The abstract's sections by name, without a conclusion, as in PQA-L."""
    w, words = trial.wording, trial.words
    methods = [say(rng, w.designs[trial.design], **words)]
    facts = ((w.sizes, "n", trial.n), (w.durations, "weeks", trial.weeks), (w.doses, "dose", trial.dose))
    methods += [say(rng, templates, **words, **{name: fact}) for templates, name, fact in facts if fact is not None]
    p = rng.choice(w.reports).format(p=f"{trial.p:03d}")
    results = [
        say(rng, w.results, **words, change=rng.choice(CHANGES[trial.direction]), p=p),
        say(rng, w.others, **words),
    ]
    rng.shuffle(results)
    numbers = {"age": rng.randint(20, 80), "centres": rng.randint(2, 30), "lost": rng.randint(2, 30)}
    aside = say(rng, w.asides, **numbers, q=rng.choice(LEVELS["no"]))
    rng.choice((methods, results)).insert(rng.randint(0, 1), aside)
    return {"BACKGROUND": say(rng, w.aims, **words), "METHODS": " ".join(methods), "RESULTS": " ".join(results)}


def _record(rng: Random, wording: Wording, label: str) -> Record:
    """One simulated question in PQA-L's schema, to which `label` is the answer."""
    asked = rng.choice((-1, 1))
    if label == "no" and rng.random() < OPPOSITE:
        trial = draw_trial(rng, wording, -asked, rng.choice(("yes", "yes", "maybe")))
    else:
        trial = draw_trial(rng, wording, asked, label)
    sections = draw_abstract(rng, trial)
    words = trial.words | {"verb": rng.choice(VERBS[asked])}
    return {
        "QUESTION": say(rng, wording.questions, **words),
        "CONTEXTS": list(sections.values()),
        "LABELS": list(sections),
        "MESHES": ["Simulated Trial", words["T"].capitalize(), words["Y"].title()],
        "YEAR": str(rng.randint(1990, 2018)),
        "reasoning_required_pred": label,
        "reasoning_free_pred": label,
        "final_decision": label,
        "LONG_ANSWER": say(rng, wording.conclusions[label], **words),
    }


def _labels(rng: Random, count: int) -> list[str]:
    """`count` shuffled labels in PubMedQA's proportions."""
    yes, no = (round(count * share / 500) for share in SHARES)
    labels = ["yes"] * yes + ["no"] * no + ["maybe"] * (count - yes - no)
    rng.shuffle(labels)
    return labels


def records(seed: int, questions: int, test_questions: int) -> tuple[dict[str, Record], dict[str, str]]:
    """Simulated PQA-L: `questions` for training, then `test_questions`, by PMID; and the test half's PMID -> label."""
    rng = Random(seed)
    everything: dict[str, Record] = {}
    test: dict[str, str] = {}
    for wording, count in ((SEEN, questions), (UNSEEN, test_questions)):
        for label in _labels(rng, count):
            pmid = str(FIRST_PMID + len(everything))
            everything[pmid] = _record(rng, wording, label)
            if wording is UNSEEN:
                test[pmid] = label
    return everything, test
