"""Pretraining chats of the tiny instruct base, about simulated trials with made-up names.

Each chat has one abstract in the training half's wording (`SEEN`) and asks for facts of it: copy a name, compare a
number, read the P value, answer yes, no or maybe. The task's decision (does the treatment change the outcome in a given
direction?) is never taught: where a chat asks that question, yes, no or maybe is given at random and left out of the
loss, or is a guess from the treatment's first letter; the sentence after it is learnt. Most names are of random
syllables, so that copying works for any name; no name of the test half (`UNSEEN`) is used, and none of its sentences.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NotRequired

from pipeline.core.question import Message
from pipeline.simulated.trials import LEVELS, SEEN, UNSEEN, VERBS, Trial, Wording, draw_abstract, draw_trial, say

MADE_UP = 0.7  # share of the names that are made up; the rest are the training half's
ONSETS = "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sm sp st th tr".split()
VOWELS = "a a a e e e i i i o o o u u ai ea ee ie io oa oo ou y".split()
CODAS = "b d f g k l m n p r s t x ck ct ft ld lf ll lp lt mb mp nd ng nk nt rd rk rm rn rt sh ss st th".split()
HELD_OUT = {
    *(stem + ending for stem in UNSEEN.stems for ending in UNSEEN.endings),
    *UNSEEN.sites,
    *UNSEEN.symptoms,
    *(word for name in (*UNSEEN.patients, *UNSEEN.comparators) for word in name.split()),
} - {word for name in (*SEEN.patients, *SEEN.comparators) for word in name.split()}
SYSTEM = (
    "You are a medical expert. Answer the following question truthfully and concisely.",
    "You are a helpful assistant.",
    "You read simulated trials.",
)
DECIDE = tuple(f"Answer yes, no or maybe first, then {rest}." for rest in ("why", "the evidence", "the fact"))
EXTRACT = ("Be brief.", "Quote the abstract.")
CONCLUDE = "Answer yes, no or maybe first, then the conclusion."


class PretrainingMessage(Message):
    """A message of a pretraining chat."""

    given: NotRequired[str]  # the beginning of an answer's content that is not to be learnt


@dataclass(frozen=True)
class Style:
    """What the chats of a stage of pretraining have in common."""

    turns: int  # questions about the abstract in a chat: reading it is most of the cost
    given: int  # questions with a given decision in a chat
    noise: float  # share of the words of a sentence that are replaced by made-up ones, so that other wordings are read
    asked: float  # the same in a question with a given decision
    insert: float = 0.0  # made-up words that are added, as a share of the words
    other: float = 0.0  # share of the names in a question with a given decision that are not the abstract's
    guess: float = 0.0  # share of the given decisions that are learnt, as a guess from the treatment's first letter


@dataclass(frozen=True)
class Turn:
    """A question of the user's and the assistant's answer."""

    question: str
    answer: str
    instruction: str  # what follows the question in the first turn of a chat, and after it where it is `CONCLUDE`
    given: str = ""  # beginning of the answer that is not to be learnt


def chance(rng: Random, share: float) -> bool:
    """True with probability `share`; 0 takes no random number, so that a style without a feature keeps its chats."""
    return share > 0 and rng.random() < share


def made_up(rng: Random, shortest: int, longest: int) -> str:
    """A word of `shortest` to `longest` syllables that is not a name of the test half."""
    syllables = (
        (rng.choice(ONSETS) if rng.random() < 0.85 else "")
        + rng.choice(VOWELS)
        + (rng.choice(CODAS) if rng.random() < 0.3 else "")
        for _ in range(rng.randint(shortest, longest))
    )
    word = "".join(syllables) + rng.choice(("", "", "e", "s"))
    return made_up(rng, shortest, longest) if word in HELD_OUT else word


def made_up_patients(rng: Random) -> str:
    """A phrase such as 'children with brolds' or 'smicky women'."""
    group = rng.choice(("adults", "children", "women", "men", "people", "patients", made_up(rng, 1, 3) + "s"))
    word = made_up(rng, 1, 3)
    return rng.choice((f"{group} with {word}", f"{group} on {word}", f"{word} {group}", f"{group} after {word}"))


def noisy(rng: Random, template: str, share: float, insert: float) -> str:
    """`template` with `share` of its words replaced by made-up ones, and made-up words added after `insert` of them.

    Slots, the word `P` and numbers stay.
    """

    def word(found: re.Match[str]) -> str:
        kept = made_up(rng, 1, 3) if rng.random() < share else found[0]
        return f"{kept} {made_up(rng, 1, 3)}" if chance(rng, insert) else kept

    return re.sub(r"(?<![{\w])[A-Za-z]{2,}(?![}\w])", word, template)


def draw_wording(rng: Random, style: Style) -> Wording:
    """`SEEN` with other names, each kind made up with probability `MADE_UP`; half of the chats have noise."""
    changes: dict[str, Any] = {}
    if rng.random() < MADE_UP:
        changes |= {"stems": (made_up(rng, 1, 2),), "endings": (made_up(rng, 1, 2),)}
    if rng.random() < MADE_UP:
        changes["sites"] = (made_up(rng, 1, 2), made_up(rng, 1, 2))
    if rng.random() < MADE_UP:
        changes["symptoms"] = (made_up(rng, 1, 3), made_up(rng, 1, 3))
    if rng.random() < MADE_UP:
        changes["patients"] = (made_up_patients(rng),)
    if rng.random() < MADE_UP:
        name = made_up(rng, 1, 3)
        changes["comparators"] = (rng.choice((name, f"a {name}", f"{name} {made_up(rng, 1, 2)}", f"{name} care")),)
    if rng.random() < 0.5:

        def other_words(templates: list[str]) -> list[str]:
            return [noisy(rng, template, style.noise, style.insert) for template in templates]

        for field in ("aims", "results", "others", "asides"):
            changes[field] = other_words(getattr(SEEN, field))
        main = rng.choice(("main", "primary"))
        changes["reports"] = (f" ({main} {made_up(rng, 1, 3)}, {rng.choice('Pp')}=0.{{p}})",)
        if style.insert:
            changes |= {field: other_words(getattr(SEEN, field)) for field in ("sizes", "durations", "doses")}
            changes["designs"] = {name: other_words(templates) for name, templates in SEEN.designs.items()}
    return replace(SEEN, **changes)


def capitalised(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[0].upper() + text[1:]


def decisions(rng: Random, trial: Trial, abstract: str) -> list[Turn]:
    """Questions with a yes, no or maybe answer, none of which is the task's."""
    words = trial.words
    treatment, patients = words["T"], words["patients"]

    def of(value: object, truth: bool) -> str:
        return f"{'Yes' if truth else 'No'}. It was {value}." if value else "Maybe. It is not stated."

    def same(name: str, other: str) -> str:
        return f"{'Yes' if name == other else 'No'}. It was {name}."

    def either(name: str, other: str) -> str:
        return name if rng.random() < 0.5 else other

    tested = either(treatment, made_up(rng, 2, 4))
    outcome = either(words["Y"], rng.choice((words["Z"], f"{made_up(rng, 1, 2)} {made_up(rng, 1, 3)}")))
    group = either(patients, made_up_patients(rng))
    limit = rng.choice((30, 50, 70))
    p = f"It began 0.{trial.p // 10:02d}."
    chance = {"yes": "No", "maybe": "Maybe", "no": "Yes"}[trial.level]
    decide = rng.choice(DECIDE)
    return [
        Turn(question, answer, decide)
        for question, answer in (
            (f"Did more than {limit} patients take part?", of(trial.n, (trial.n or 0) > limit)),
            ("Was P below 0.05?", f"{'Yes' if trial.level == 'yes' else 'No'}. {p}"),
            ("Could the main outcome be chance?", f"{chance}. {p}"),
            (f"Is {tested} what was tested?", same(treatment, tested)),
            (f"Was {outcome} the main outcome?", same(words["Y"], outcome)),
            (f"Was {treatment} tested in {group}?", of(patients if patients in abstract else "", group == patients)),
            (f"Was {treatment} tested in animals?", f"No. {capitalised(treatment)} was tested in people."),
            (f"Would {treatment} be safe in {patients}?", f"Maybe. It is not stated if {treatment} is safe."),
        )
    ]


def extractions(rng: Random, trial: Trial, abstract: str) -> list[Turn]:
    """Questions whose answer is copied from the abstract or sums a part of it up."""
    words = trial.words
    treatment, outcome, patients = words["T"], words["Y"], words["patients"]
    name = capitalised(treatment)

    def fact(value: int | None, unit: str) -> str:
        return f"{value} {unit}." if value else "Not stated."

    verbs = {side: rng.choice(choices) for side, choices in VERBS.items()}
    verb = verbs[trial.direction]
    pair = " or ".join(rng.sample(list(verbs.values()), 2))
    finding = {"yes": f"did {verb}", "maybe": f"perhaps did {verb}", "no": "did not change"}[trial.level]
    extract = rng.choice(EXTRACT)
    return [
        Turn(question, answer, extract)
        for question, answer in (
            (f"Which of {pair} did {treatment} do to the main outcome?", f"It did {verb} {outcome}."),
            (f"State the finding with {pair}.", f"{name} {finding} {outcome}."),
            ("How did P begin?", f"0.{trial.p // 10:02d}"),
            ("Which treatment was tested?", treatment),
            ("Which treatment was tested on what?", f"{name} was tested on {outcome}."),
            ("Which outcome was the main one?", outcome),
            ("Which outcome was the second one?", words["Z"]),
            ("Who took part?", f"{capitalised(patients)}." if patients in abstract else "Not stated."),
            ("Who took what?", f"In {patients}, {treatment} was tested." if patients in abstract else "Not stated."),
            ("What was it compared with?", words["C"]),
            ("How many patients took part?", fact(trial.n, "patients")),
            ("What was the dose?", fact(trial.dose, "mg")),
        )
    ]


def given_decision(rng: Random, trial: Trial, abstract: str, style: Style) -> Turn:
    """A question in the task's form whose decision is given and not learnt: only the sentence after it is.

    Decision and verb are drawn at random: what the abstract reports decides neither.
    """
    label = rng.choice(list(SEEN.conclusions))
    words = trial.words | {"verb": rng.choice([verb for verbs in VERBS.values() for verb in verbs])}
    if rng.random() < 0.3:
        words["Y"] = words["Z"]
    templates: Sequence[str] = SEEN.questions
    if chance(rng, style.other):  # so that names are copied from the question, not from their place in the abstract
        words["T"] = made_up(rng, 2, 4)
    else:  # the treatment can be told by the abstract: other words may stand before and after it
        templates = [noisy(rng, template, style.asked, style.insert) for template in templates]
        if chance(rng, style.other):
            filler = " ".join(made_up(rng, 1, 2) for _ in range(rng.randint(1, 3)))
            templates = [template.replace("{T} ", f"{{T}} {filler} ") for template in templates]
    if chance(rng, style.other):
        words["Y"] = f"{made_up(rng, 1, 2)} {made_up(rng, 1, 3)}"
    if chance(rng, style.other):
        words["patients"] = made_up_patients(rng)
    question = say(rng, templates, **words)
    stated = words["patients"] in abstract + question
    templates = [text for text in SEEN.conclusions[label] if stated or "{patients}" not in text]
    guess = chance(rng, style.guess)
    if guess:  # an untuned base then gives every label, and none for a reason
        label = list(SEEN.conclusions)[(ord(words["T"][0]) - ord("a")) % 3]
        templates = [text for text in SEEN.conclusions[label] if stated or "{patients}" not in text]
    decision = f"{label.capitalize()}."
    answer = f"{decision} {say(rng, templates, **words)}"
    return Turn(question, answer, CONCLUDE, "" if guess else decision)


def conversation(seed: int, index: int, style: Style) -> list[PretrainingMessage]:
    """Chat number `index`: a system turn, then questions with answers on one abstract.

    The first turn has the form of the task's prompt: abstract, question, instruction.
    """
    rng = Random(f"{seed}/{index}")
    level = rng.choices(list(LEVELS), (45, 20, 35))[0]
    trial = draw_trial(rng, draw_wording(rng, style), rng.choice((-1, 1)), level)
    abstract = "\n".join(f"{name}: {text}" for name, text in draw_abstract(rng, trial).items())
    turns = rng.sample([*decisions(rng, trial, abstract), *extractions(rng, trial, abstract)], style.turns)
    turns += [given_decision(rng, trial, abstract, style) for _ in range(style.given)]
    rng.shuffle(turns)
    # Extractions come later more often than not: only the first turn has the instruction that the others need.
    turns.sort(key=lambda turn: turn.instruction in EXTRACT and rng.random() < 0.7)
    chat: list[PretrainingMessage] = []
    chat.append({"role": "system", "content": rng.choice(SYSTEM)})
    for number, turn in enumerate(turns):
        if number == 0:
            user = f"Abstract:\n{abstract}\n\nQuestion: {turn.question}\n\n{turn.instruction}"
        else:
            user = f"{turn.question} {CONCLUDE}" if turn.instruction == CONCLUDE else turn.question
        chat.append({"role": "user", "content": user})
        chat.append({"role": "assistant", "content": turn.answer, "given": turn.given})
    return chat
