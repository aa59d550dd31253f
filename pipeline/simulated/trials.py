"""Simulated trial abstracts in the exact schema of PubMedQA's PQA-L, and chats about such abstracts.

Nothing here is medicine: treatments, patients and numbers are drawn by `random.Random(seed)`, and a score on them
says nothing about medical accuracy. Every abstract reports its main outcome as higher or lower with the treatment,
with a P value, and names a second outcome; sizes, doses, ages and another P value distract. A question asks whether
the treatment moves the main outcome in a given direction:

- yes: the outcome went in that direction with P < 0.05;
- maybe: it went in that direction with 0.05 <= P < 0.10;
- no: P >= 0.10, or the outcome went in the other direction.

`records` draws the questions of the task and `conversations` the pretraining of the tiny instruct base, which asks
other questions. The test half shares no treatment, outcome, patients or wording with either (`SEEN`, `UNSEEN`).
"""

from dataclasses import dataclass
from random import Random

from pipeline.core.records import Message, Record

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
TURNS = 9  # questions in a pretraining chat: many a chat, since reading the abstract is most of its cost


@dataclass(frozen=True)
class Wording:
    """The words of one side of the split; braces name what `_abstract` and `_record` fill in."""

    stems: tuple[str, ...]  # a treatment is a stem with an ending
    endings: tuple[str, ...]
    comparators: tuple[str, ...]
    sites: tuple[str, ...]  # an outcome is a site with a symptom
    symptoms: tuple[str, ...]
    patients: tuple[str, ...]
    aims: tuple[str, ...]
    designs: dict[str, tuple[str, ...]]
    sizes: tuple[str, ...]
    durations: tuple[str, ...]
    doses: tuple[str, ...]
    results: tuple[str, ...]  # of the main outcome
    others: tuple[str, ...]  # of the second outcome, which distracts
    reports: tuple[str, ...]  # how a result gives its P value
    asides: tuple[str, ...]  # sentences whose numbers distract
    questions: tuple[str, ...]
    conclusions: dict[str, tuple[str, ...]]


SEEN = Wording(
    stems=tuple("bel cor dal fen gal hep jun kel lor mel nov pal quin ras sol tam ur val wex zan".split()),
    endings=tuple("acine adol amide atrel endal idone inib olol oxan umab ustat yline".split()),
    comparators=("placebo", "usual care", "no treatment", "the older drug", "waiting", "diet alone"),
    sites=tuple("knee back chest skin jaw hip throat stomach wrist foot leg nerve joint wound ear bladder".split()),
    symptoms=tuple("pain swelling stiffness bleeding infection weakness itching spasm numbness redness".split()),
    patients=("adults with asthma", "older women", "men with gout", "children with eczema", "people after surgery",
              "patients with diabetes", "nurses on night shifts", "adults with migraine"),
    aims=("We tested {T} in {patients}.", "To study {T} for {patients}.", "The place of {T} in {patients} is unclear.",
          "This trial compared {T} with {C}.", "{T} has been proposed for {patients}.", "Little is known about {T}."),
    designs={
        "randomised": ("Patients were randomised to {T} or {C}.", "In this randomised trial, {T} met {C}."),
        "observational": ("This was an observational cohort on {T} or {C}.", "An observational study had {T} and {C}."),
        "": ("Patients received {T} or {C}.", "{T} was compared with {C}.", "The groups had {T} or {C}."),
    },
    sizes=("{n} patients took part.", "We enrolled {n} patients.", "The sample was {n} people.",
           "There were {n} participants."),
    durations=("Follow-up was {weeks} weeks.", "They were followed for {weeks} weeks.", "It took {weeks} weeks."),
    doses=("The dose was {dose} mg.", "{T} was given at {dose} mg.", "All took {dose} mg."),
    results=("{Y} was {change} with {T} than with {C}{p}.", "Compared with {C}, {T} gave {change} {Y}{p}.",
             "In the {T} group, {Y} was {change}{p}.", "There was {change} {Y} under {T}{p}.",
             "For {Y}, values were {change} with {T}{p}.", "{T} patients had {change} {Y}{p}.",
             "We found {change} {Y} with {T}{p}.", "As to {Y}, it was {change} on {T}{p}.",
             "{T} was followed by {change} {Y}{p}.", "The {Y} score was {change} after {T}{p}.",
             "Participants reported {change} {Y}{p}.", "On average, {Y} was {change}{p}."),
    others=("{Z} was studied too.", "We also looked at {Z}.", "{Z} was recorded as well.", "{T} was tried on {Z}.",
            "A further outcome was {Z}.", "Some patients had {Z}.", "Data on {Z} were taken."),
    reports=(" (main outcome, P=0.{p})", " (main analysis, P=0.{p})", " (primary result, p=0.{p})"),
    asides=("Mean age was {age} years.", "Their age was {age} on average.", "{centres} centres took part.",
            "Data came from {centres} clinics.", "{lost} patients were lost.", "Age did not differ (P=0.{q})."),
    questions=("Does {T} {verb} {Y} in {patients}?", "Can {T} {verb} {Y}?", "In {patients}, does {T} {verb} {Y}?",
               "Is it true that {T} can {verb} {Y}?", "Will {T} {verb} {Y}?"),
    conclusions={"yes": ("{T} can {verb} {Y}.", "In {patients}, {T} seems to {verb} {Y}."),
                 "no": ("{T} does not {verb} {Y}.", "In {patients}, {T} failed to {verb} {Y}."),
                 "maybe": ("{T} may {verb} {Y}, but this is uncertain.", "Whether {T} can {verb} {Y} is uncertain.")},
)  # fmt: skip

UNSEEN = Wording(
    stems=tuple("bri cla dor fli gri hul kar lin mor pri".split()),
    endings=tuple("abine avir icept ofen oline uride".split()),
    comparators=("sham therapy", "standard care", "a dummy tablet", "rest"),
    sites=tuple("neck shoulder elbow gum lung heel scalp thumb".split()),
    symptoms=tuple("ache cramp rash fatigue tremor soreness".split()),
    patients=("teenagers with acne", "adults with arthritis", "pregnant women", "people on dialysis"),
    aims=("Does {T} help {patients}?", "Our aim was to assess {T}.", "{T} is often given to {patients}."),
    designs={
        "randomised": ("Participants were randomised between {C} and {T}.",),
        "observational": ("The design was an observational cohort of {T} and {C}.",),
        "": ("Participants took either {C} or {T}.", "The arms were {T} and {C}."),
    },
    sizes=("A total of {n} participants were included.", "The analysis covers {n} people."),
    durations=("The study ran for {weeks} weeks.", "Visits went on until week {weeks}."),
    doses=("Each person took {dose} mg.", "We chose a {dose} mg dose."),
    results=("People on {T} had {change} {Y} than people on {C}{p}.", "{Y} turned out {change} on {T}{p}.",
             "On {T}, we saw {change} {Y}{p}.", "{T} meant {change} {Y}{p}.",
             "{Y} became {change} once {T} was taken{p}."),
    others=("{Z} was a further endpoint.", "We studied {Z} as well.", "{Z} was also looked at."),
    reports=(" (main endpoint, P=0.{p})", " (primary finding, p=0.{p})"),
    asides=("The average age was {age}.", "Patients came from {centres} hospitals.", "{lost} people dropped out.",
            "Sex was similar in both arms (P=0.{q})."),
    questions=("Is {T} able to {verb} {Y}?", "Among {patients}, would {T} {verb} {Y}?",
               "Could {T} be used to {verb} {Y} in {patients}?", "Is {T} expected to {verb} {Y}?"),
    conclusions={"yes": ("The data show that {T} will {verb} {Y}.",), "no": ("{T} was not shown to {verb} {Y}.",),
                 "maybe": ("It stays open if {T} will {verb} {Y}.",)},
)  # fmt: skip


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


def _trial(rng: Random, wording: Wording, direction: int, label: str) -> Trial:
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


def _say(rng: Random, templates: tuple[str, ...], **words: object) -> str:
    """One of `templates` filled in, as a sentence."""
    sentence = rng.choice(templates).format(**words)
    return sentence[0].upper() + sentence[1:]


def _abstract(rng: Random, trial: Trial) -> dict[str, str]:
    """The abstract's sections by name, without a conclusion, as in PQA-L."""
    w, words = trial.wording, trial.words
    methods = [_say(rng, w.designs[trial.design], **words)]
    facts = ((w.sizes, "n", trial.n), (w.durations, "weeks", trial.weeks), (w.doses, "dose", trial.dose))
    methods += [_say(rng, templates, **words, **{name: fact}) for templates, name, fact in facts if fact is not None]
    p = rng.choice(w.reports).format(p=f"{trial.p:03d}")
    results = [
        _say(rng, w.results, **words, change=rng.choice(CHANGES[trial.direction]), p=p),
        _say(rng, w.others, **words),
    ]
    rng.shuffle(results)
    numbers = {"age": rng.randint(20, 80), "centres": rng.randint(2, 30), "lost": rng.randint(2, 30)}
    aside = _say(rng, w.asides, **numbers, q=rng.choice(LEVELS["no"]))
    rng.choice((methods, results)).insert(rng.randint(0, 1), aside)
    return {"BACKGROUND": _say(rng, w.aims, **words), "METHODS": " ".join(methods), "RESULTS": " ".join(results)}


def _record(rng: Random, wording: Wording, label: str) -> Record:
    """One simulated question in PQA-L's schema, to which `label` is the answer."""
    asked = rng.choice((-1, 1))
    if label == "no" and rng.random() < OPPOSITE:
        trial = _trial(rng, wording, -asked, rng.choice(("yes", "yes", "maybe")))
    else:
        trial = _trial(rng, wording, asked, label)
    sections = _abstract(rng, trial)
    words = trial.words | {"verb": rng.choice(VERBS[asked])}
    return {
        "QUESTION": _say(rng, wording.questions, **words),
        "CONTEXTS": list(sections.values()),
        "LABELS": list(sections),
        "MESHES": ["Simulated Trial", words["T"].capitalize(), words["Y"].title()],
        "YEAR": str(rng.randint(1990, 2018)),
        "reasoning_required_pred": label,
        "reasoning_free_pred": label,
        "final_decision": label,
        "LONG_ANSWER": _say(rng, wording.conclusions[label], **words),
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


DECIDE = tuple(f"Answer yes, no or maybe first, then {rest}." for rest in ("why", "the evidence", "the fact"))
EXTRACT = ("Be brief.", "Quote the abstract.")
SYSTEM = (
    "You are a medical expert. Answer the following question truthfully and concisely.",
    "You are a helpful assistant.",
    "You read simulated trials.",
)


def _decisions(rng: Random, trial: Trial) -> list[tuple[str, str]]:
    """Questions with a yes, no or maybe answer, none of which is the task's."""

    def verdict(value: object, truth: bool) -> str:
        return f"{'Yes' if truth else 'No'}. It was {value}." if value else "Maybe. It is not stated."

    treatment, patients = trial.words["T"], trial.words["patients"]
    p = f"It began 0.{trial.p // 10:02d}."
    chance = {"yes": "No", "maybe": "Maybe", "no": "Yes"}[trial.level]
    return [
        ("Did more than 50 patients take part?", verdict(trial.n, (trial.n or 0) > 50)),
        ("Was P below 0.05?", f"{'Yes' if trial.level == 'yes' else 'No'}. {p}"),
        ("Could the main outcome be chance?", f"{chance}. {p}"),
        (f"Is {treatment} what was tested?", f"Yes. It was {treatment}."),
        (f"Was {treatment} tested in animals?", f"No. It was tested in {patients}."),
        (f"Would {treatment} be safe in {patients}?", verdict(None, False)),
    ]


def _extractions(rng: Random, trial: Trial) -> list[tuple[str, str]]:
    """Questions whose answer is copied from the abstract, or the conclusion in fixed words."""

    def fact(value: int | None, unit: str) -> str:
        return f"{value} {unit}." if value else "Not stated."

    treatment = trial.words["T"]
    verbs = {side: rng.choice(words) for side, words in VERBS.items()}
    verb = verbs[trial.direction]
    either = " or ".join(rng.sample(list(verbs.values()), 2))
    conclusion = {"yes": f"did {verb} it", "maybe": f"perhaps did {verb} it", "no": "did not change it"}[trial.level]
    return [
        (f"Which of {either} did {treatment} do to the main outcome?", f"It did {verb} it."),
        (f"State the conclusion with {either}.", f"{treatment} {conclusion}."),
        ("How did P begin?", f"0.{trial.p // 10:02d}"),
        ("Which treatment was tested?", treatment),
        ("What was it compared with?", trial.words["C"]),
        ("How many patients took part?", fact(trial.n, "patients")),
        ("What was the dose?", fact(trial.dose, "mg")),
    ]


def conversations(seed: int, count: int) -> list[list[Message]]:
    """`count` chats of `TURNS` questions each, each chat on one simulated abstract in the wording `SEEN`.

    The first turn has the form of `pipeline.scoring.protocols`: abstract, question, instruction. The questions are not
    the task's.
    """
    rng = Random(seed)
    chats: list[list[Message]] = []
    for _ in range(count):
        level = rng.choices(list(LEVELS), (45, 20, 35))[0]
        trial = _trial(rng, SEEN, rng.choice((-1, 1)), level)
        abstract = "\n".join(f"{name}: {text}" for name, text in _abstract(rng, trial).items())
        asked = [(*pair, rng.choice(DECIDE)) for pair in _decisions(rng, trial)]
        asked += [(*pair, rng.choice(EXTRACT)) for pair in _extractions(rng, trial)]
        asked = rng.sample(asked, TURNS)
        # Decisions come first more often than not: only the first turn has the instruction that asks for them.
        asked.sort(key=lambda turn: turn[2] in EXTRACT and rng.random() < 0.7)
        question, _, instruction = asked[0]
        users = [f"Abstract:\n{abstract}\n\nQuestion: {question}\n\n{instruction}", *(q for q, _, _ in asked[1:])]
        chat = [{"role": "system", "content": rng.choice(SYSTEM)}]
        for user, (_, answer, _) in zip(users, asked, strict=True):
            chat += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        chats.append(chat)
    return chats
