"""Browse: one HTML page of the test questions, with what each model answered, to look for patterns in the errors.

The page needs no network and holds the texts of the questions: git ignores it, and it is only as public as they are.
"""

from pathlib import Path
from typing import NamedTuple

import typer

from pipeline.commands.ask import doubts, shares
from pipeline.core.conclusion import Conclusion
from pipeline.core.errors import Fail
from pipeline.core.files import read_as, read_rows
from pipeline.core.labels import LABELS, Label
from pipeline.core.outputs import writing
from pipeline.core.question import Question
from pipeline.reporting.comparison import BASE, MERGED, OVERLAP, TUNED, Comparison, note
from pipeline.reporting.pages import render
from pipeline.scoring.answers import read_answers
from pipeline.scoring.predictions import Prediction, read_predictions
from pipeline.scoring.protocols import abstract_of
from pipeline.sections.evaluate import ProtocolName

TEST, CONCLUSIONS = Path("data/formatted/test.jsonl"), Path("data/formatted/conclusions.jsonl")
ANSWERS, METRICS = Path("data/answers.jsonl"), Path("metrics")
FILTERS = {  # of the tuned model's answers
    "wrong": "wrong",
    "unsure": "unsure",
    "tuning": "changed by tuning",
    "quantization": "changed by quantization",
}


class Row(NamedTuple):
    """What a model makes of a question."""

    model: str
    prediction: Label
    shares: dict[Label, float]  # of the labels' probability, in the order of LABELS
    label_mass: float  # the labels' probability together
    right: bool


class Entry(NamedTuple):
    """A question on the page."""

    pmid: str
    label: Label
    question: str
    abstract: str
    conclusion: str
    rows: list[Row]
    written: dict[str, str]  # model -> its written answer
    filters: list[str]  # keys of FILTERS that it passes


def scores(prediction: Prediction) -> dict[Label, float]:
    """Label -> log-probability."""
    return dict(zip(LABELS, prediction.log_probabilities, strict=True))


def row(model: str, prediction: Prediction) -> Row:
    """A model's row in the table of a question."""
    from numpy import exp, logaddexp

    found = shares(scores(prediction))
    return Row(
        model,
        prediction.prediction,
        {label: found[label] for label in LABELS},
        float(exp(logaddexp.reduce(prediction.log_probabilities))),
        prediction.prediction == prediction.label,
    )


def entry(question: Question, conclusion: str, models: dict[str, Prediction], written: dict[str, str]) -> Entry:
    """A question with what the models make of it; `models` and `written` are by the models' names."""
    tuned, base, merged = models[TUNED], models[BASE], models.get(MERGED)
    passed = {
        "wrong": tuned.prediction != tuned.label,
        "unsure": bool(doubts(scores(tuned))),
        "tuning": tuned.prediction != base.prediction,
        "quantization": merged is not None and tuned.prediction != merged.prediction,
    }
    return Entry(
        question.pmid,
        question.label,
        question.question,
        abstract_of(question),
        conclusion,
        [row(model, prediction) for model, prediction in models.items()],
        written,
        [name for name, passes in passed.items() if passes],
    )


def entries(comparison: Comparison) -> list[Entry]:
    """Every test question; raises `Fail` if a table has not the same questions."""
    questions = read_rows(TEST, Question)
    conclusions = {row.pmid: row.long_answer for row in read_rows(CONCLUSIONS, Conclusion)}
    tables: list[tuple[str, str, ProtocolName]]
    tables = [(BASE, "base", comparison.base_protocol.chosen), (MERGED, "merged", "chat"), (TUNED, "tuned", "chat")]
    models: dict[str, dict[str, Prediction]] = {}
    for name, file, protocol in tables:
        path = METRICS / "predictions" / f"{file}.csv"
        rows = {row.pmid: row for row in read_predictions(path).get(protocol, [])}
        if not rows and name == MERGED:
            continue
        if rows.keys() != {question.pmid for question in questions} or rows.keys() != conclusions.keys():
            raise Fail(f"{path}, {TEST} and {CONCLUSIONS} have different questions; run `dvc repro`")
        models[name] = rows
    names = {"tuned": TUNED, "base": BASE}
    written = {(row.pmid, names[row.model]): row.text for row in read_answers(ANSWERS)}
    return [
        entry(
            question,
            conclusions[question.pmid],
            {model: rows[question.pmid] for model, rows in models.items()},
            {model: written[question.pmid, model] for model in models if (question.pmid, model) in written},
        )
        for question in questions
    ]


def main(output: Path = Path("browse.html")) -> None:
    """Write the page of the last run to OUTPUT; open it in a browser."""
    comparison = read_as(Comparison, METRICS / "compare.json")
    measured = comparison.merged is not None
    page = render(
        "browse.html.j2",
        note=note(comparison),
        overlap=OVERLAP if comparison.answers else "",
        base_protocol=comparison.base_protocol.chosen,
        filters={name: title for name, title in FILTERS.items() if measured or name != "quantization"},
        labels=LABELS,
        entries=entries(comparison),
    )
    with writing(output) as partial:
        partial.write_text(page, encoding="utf-8")
    typer.echo(f"Open {output} in a browser; no network is needed. It holds the texts of the questions.")
