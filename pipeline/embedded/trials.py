"""Simulated trial abstracts in the exact schema of PubMedQA's PQA-L, and chats about such abstracts.

Nothing here is medicine: treatments, patients and numbers are drawn by `random.Random(seed)`, and a score on them
says nothing about medical accuracy. Every abstract reports two outcomes, each as higher or lower with the
treatment and with a P value. A question asks whether the treatment changes one of them in a given direction:

- yes: the outcome went in that direction with P < 0.05;
- maybe: it went in that direction with 0.05 <= P < 0.10;
- no: P >= 0.10, or the outcome went in the other direction.

`records` draws the questions of the task and `conversations` the pretraining of the tiny instruct base, which asks
other questions. The test half shares no treatment, outcome, patient group or wording with either (`SEEN`, `UNSEEN`).
"""

from dataclasses import dataclass
from random import Random

from pipeline.records import Message, Record

SHARES = (276, 169)  # yes and no in 500, as in PubMedQA's official test set: 55.2 % and 33.8 %; the rest is maybe
FIRST_PMID = 900_000_000  # real PMIDs have 8 digits: a simulated one is never taken for a paper
# P values in hundredths. Few distinct numbers: the tiny base meets each often enough to read and copy it.
SIGNIFICANT = (1, 2, 3, 4)
BORDERLINE = (5, 6, 7, 8, 9)
NOT_SIGNIFICANT = (12, 16, 21, 27, 34, 38, 45, 52, 59, 63, 71, 78, 84, 92)
SIZES = (24, 30, 36, 40, 45, 48, 60, 64, 72, 80, 90, 96)
WEEKS = (4, 6, 8, 12, 16, 20, 24, 30, 36, 40, 48, 52)
DOSES = (2, 4, 5, 8, 10, 12, 16, 20, 30, 40, 60, 80)
STATED = 0.75  # share of abstracts that state design, size, follow-up or dose


@dataclass(frozen=True)
class Wording:
    """The words of one side of the split; braces name what `Trial` fills in."""

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
    results: tuple[str, ...]
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
        "observational": ("This was an observational cohort on {T} or {C}.", "An observational study set {T} against {C}."),
        "": ("Patients received {T} or {C}.", "{T} was compared with {C}.", "The groups had {T} or {C}."),
    },
    sizes=("{n} patients took part.", "We enrolled {n} patients.", "The sample was {n} people.", "There were {n} participants."),
    durations=("Follow-up was {weeks} weeks.", "They were followed for {weeks} weeks.", "The trial took {weeks} weeks."),
    doses=("The dose was {dose} mg.", "{T} was given at {dose} mg.", "All took {dose} mg."),
    results=("{Y} was {change} with {T} than with {C} (P=0.{p}).", "Compared with {C}, {T} gave {change} {Y} (P=0.{p}).",
             "In the {T} group, {Y} was {change} (P=0.{p}).", "There was {change} {Y} under {T}, P=0.{p}.",
             "For {Y}, values were {change} with {T} (P=0.{p}).", "{T} patients had {change} {Y} (p=0.{p}).",
             "We found {change} {Y} with {T} (p=0.{p}).", "As to {Y}, it was {change} on {T}; P=0.{p}.",
             "{T} was followed by {change} {Y}, p=0.{p}.", "The {Y} score was {change} after {T} (P=0.{p}).",
             "Participants reported {change} {Y} (p=0.{p}).", "On average, {Y} was {change} (P=0.{p})."),
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
    results=("People on {T} reported {change} {Y} than people on {C} (P=0.{p}).", "{Y} turned out {change} on {T} (P=0.{p}).",
             "On {T}, we saw {change} {Y}, with P=0.{p}.", "With {T} there was {change} {Y} (p=0.{p}).",
             "{Y} became {change} once {T} was taken, P=0.{p}."),
    asides=("The average age was {age}.", "Patients came from {centres} hospitals.", "{lost} people dropped out.",
            "Sex was similar in both arms (P=0.{q})."),
    questions=("Is {T} able to {verb} {Y}?", "Among {patients}, would {T} {verb} {Y}?",
               "Could {T} be used to {verb} {Y} in {patients}?", "Is {T} expected to {verb} {Y}?"),
    conclusions={"yes": ("The data show that {T} will {verb} {Y}.",), "no": ("{T} was not shown to {verb} {Y}.",),
                 "maybe": ("It stays open if {T} will {verb} {Y}.",)},
)  # fmt: skip

CHANGES = {-1: ("lower", "smaller", "less"), 1: ("higher", "greater", "more")}  # words of both sides of the split
VERBS = {-1: ("reduce", "lower", "decrease"), 1: ("increase", "raise", "worsen")}


@dataclass(frozen=True)
class Outcome:
    """One simulated outcome: its name, direction with the treatment (-1 lower, 1 higher), P in hundredths."""

    name: str
    direction: int
    p: int

    @property
    def p_value(self) -> str:
        return f"{self.p:02d}"

    def answer(self, direction: int) -> str:
        """The rule of the task: does the treatment move the outcome in `direction`?"""
        if direction != self.direction or self.p in NOT_SIGNIFICANT:
            return "no"
        return "yes" if self.p in SIGNIFICANT else "maybe"


@dataclass(frozen=True)
class Trial:
    """One simulated trial; a fact that the abstract does not state is None (the design: "")."""

    wording: Wording
    words: dict[str, str]  # T treatment, C comparator, patients
    design: str
    n: int | None
    weeks: int | None
    dose: int | None
    outcomes: tuple[Outcome, ...]
    absent: str  # an outcome that the abstract does not report


def _outcome(rng: Random, name: str, label: str = "", asked: int = 0) -> Outcome:
    """An outcome to which `label` is the right answer when asked about `asked`; any outcome without a label."""
    direction = asked or rng.choice((-1, 1))
    level = {"yes": SIGNIFICANT, "maybe": BORDERLINE, "no": NOT_SIGNIFICANT}.get(label)
    if label == "no" and rng.random() < 0.5:
        direction, level = -direction, rng.choice((SIGNIFICANT, SIGNIFICANT, BORDERLINE))
    level = level or rng.choices((SIGNIFICANT, BORDERLINE, NOT_SIGNIFICANT), (45, 20, 35))[0]
    return Outcome(name, direction, rng.choice(level))


def _trial(rng: Random, wording: Wording, label: str = "", asked: int = 0) -> Trial:
    """A trial whose first outcome fits `label`; the second, which distracts, is drawn freely."""
    names = [f"{s} {t}" for s, t in zip(rng.sample(wording.sites, 3), rng.sample(wording.symptoms, 3), strict=True)]
    words = {
        "T": rng.choice(wording.stems) + rng.choice(wording.endings),
        "C": rng.choice(wording.comparators),
        "patients": rng.choice(wording.patients),
    }

    def stated(values: tuple[int, ...]) -> int | None:
        return rng.choice(values) if rng.random() < STATED else None

    return Trial(
        wording=wording,
        words=words,
        design=rng.choice(list(wording.designs)),
        n=stated(SIZES),
        weeks=stated(WEEKS),
        dose=stated(DOSES),
        outcomes=(_outcome(rng, names[0], label, asked), _outcome(rng, names[1])),
        absent=names[2],
    )


def _abstract(rng: Random, trial: Trial) -> dict[str, str]:
    """The abstract's sections by name, without a conclusion, as in PQA-L."""

    def say(templates: tuple[str, ...], **values: object) -> str:
        sentence = rng.choice(templates).format(**trial.words, **values)
        return sentence[0].upper() + sentence[1:]

    w = trial.wording
    methods = [say(w.designs[trial.design])]
    facts = ((w.sizes, "n", trial.n), (w.durations, "weeks", trial.weeks), (w.doses, "dose", trial.dose))
    methods += [say(templates, **{name: value}) for templates, name, value in facts if value is not None]
    results = [
        say(w.results, Y=y.name, change=rng.choice(CHANGES[y.direction]), p=y.p_value)
        for y in rng.sample(trial.outcomes, len(trial.outcomes))
    ]
    q = rng.choice(NOT_SIGNIFICANT)
    aside = say(w.asides, age=rng.randint(20, 80), centres=rng.randint(2, 30), lost=rng.randint(2, 30), q=q)
    rng.choice((methods, results)).insert(rng.randint(0, 1), aside)
    return {"BACKGROUND": say(w.aims), "METHODS": " ".join(methods), "RESULTS": " ".join(results)}


def _record(rng: Random, wording: Wording, label: str) -> Record:
    """One simulated question in PQA-L's schema."""
    asked = rng.choice((-1, 1))
    trial = _trial(rng, wording, label, asked)
    sections = _abstract(rng, trial)
    outcome = trial.outcomes[0]
    words = trial.words | {"Y": outcome.name, "verb": rng.choice(VERBS[asked])}
    question, conclusion = (rng.choice(t).format(**words) for t in (wording.questions, wording.conclusions[label]))
    return {
        "QUESTION": question[0].upper() + question[1:],
        "CONTEXTS": list(sections.values()),
        "LABELS": list(sections),
        "MESHES": ["Simulated Trial", words["T"].capitalize(), outcome.name.title()],
        "YEAR": str(rng.randint(1990, 2018)),
        "reasoning_required_pred": label,
        "reasoning_free_pred": label,
        "final_decision": label,
        "LONG_ANSWER": conclusion[0].upper() + conclusion[1:],
    }


def _labels(rng: Random, count: int) -> list[str]:
    """`count` shuffled labels in PubMedQA's proportions."""
    yes, no = (round(count * share / 500) for share in SHARES)
    labels = ["yes"] * yes + ["no"] * no + ["maybe"] * (count - yes - no)
    rng.shuffle(labels)
    return labels


def records(seed: int, questions: int, test_questions: int) -> tuple[dict[str, Record], dict[str, str]]:
    """Simulated PQA-L: all records by PMID (train first), and the test split's PMID -> label."""
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


DECIDE = ("Answer yes, no or maybe first, then why.", "Answer yes, no or maybe first, then the evidence.")
EXTRACT = ("Be brief.", "Quote the abstract.")
SYSTEM = (
    "You are a medical expert. Answer the following question truthfully and concisely.",
    "You are a helpful assistant.",
    "You read trials.",
)


def _decisions(rng: Random, trial: Trial) -> list[tuple[str, str]]:
    """Questions with a yes, no or maybe answer, none of which is the task's."""

    def verdict(value: object, truth: bool) -> str:
        return "Maybe. It is not stated." if value in (None, "") else f"{'Yes' if truth else 'No'}. It was {value}."

    y, z, x = rng.choices(trial.outcomes, k=3)
    direction = rng.choice((-1, 1))
    design = rng.choice(("randomised", "observational"))
    side = {-1: "lower", 1: "higher"}
    t = trial.words["T"]
    chance = {"yes": "No", "no": "Yes", "maybe": "Maybe"}[x.answer(x.direction)]
    return [
        (f"Was the trial {design}?", verdict(trial.design, trial.design == design)),
        ("Did more than 50 patients take part?", verdict(trial.n, (trial.n or 0) > 50)),
        ("Did it last more than 26 weeks?", verdict(trial.weeks, (trial.weeks or 0) > 26)),
        (f"Was P below 0.05 for {y.name}?", verdict(f"0.{y.p_value}", y.p in SIGNIFICANT)),
        (
            f"Was {z.name} {rng.choice(CHANGES[direction])} with {t}?",
            verdict(side[z.direction], direction == z.direction),
        ),
        (f"Could it be chance for {x.name}?", f"{chance}. P was 0.{x.p_value}."),
    ]


def _extractions(rng: Random, trial: Trial) -> list[tuple[str, str]]:
    """Questions whose answer is copied from the abstract, or the conclusion in fixed words."""

    def fact(value: int | None, unit: str) -> str:
        return f"{value} {unit}." if value is not None else "Not stated."

    y, z = rng.sample(trial.outcomes, 2)
    t = trial.words["T"]
    verb = {-1: "lowered", 1: "raised"}[z.direction]
    conclusion = {"yes": f"{t} {verb} {z.name}.", "maybe": f"{t} perhaps {verb} {z.name}.", "no": f"{t} left {z.name} alone."}
    pair = [rng.choice(VERBS[-1]), rng.choice(VERBS[1])]
    return [
        (f"Which of {' or '.join(rng.sample(pair, 2))} did {t} do to {z.name}?", f"It did {pair[z.direction > 0]} it."),
        (f"What was P for {y.name}?", f"0.{y.p_value}"),
        ("Which treatment was tested?", t),
        ("What was it compared with?", trial.words["C"]),
        ("How many patients took part?", fact(trial.n, "patients")),
        ("What was the dose?", fact(trial.dose, "mg")),
        (f"State the conclusion on {z.name}.", conclusion[z.answer(z.direction)]),
    ]


def conversations(seed: int, count: int, turns: int = 6) -> list[list[Message]]:
    """`count` chats of `turns` questions each, each on one simulated abstract in the wording `SEEN`."""
    rng = Random(seed)
    chats: list[list[Message]] = []
    for _ in range(count):
        trial = _trial(rng, SEEN)
        abstract = "\n".join(f"{name}: {text}" for name, text in _abstract(rng, trial).items())
        asked = [(q, a, rng.choice(DECIDE)) for q, a in _decisions(rng, trial)]
        asked += [(q, a, rng.choice(EXTRACT)) for q, a in _extractions(rng, trial)]
        chat = [{"role": "system", "content": rng.choice(SYSTEM)}]
        for question, answer, instruction in rng.sample(asked, turns):
            chat.append({"role": "user", "content": question if len(chat) > 1 else f"Question: {question}\n\n{instruction}"})
            chat.append({"role": "assistant", "content": answer})
        chat[1]["content"] = f"Abstract:\n{abstract}\n\n{chat[1]['content']}"
        chats.append(chat)
    return chats
