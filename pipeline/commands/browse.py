"""Browse: one HTML page of the test questions, with what each model answered, to look for patterns in the errors.

The page needs no network and holds the texts of the questions: git ignores it, and it is only as public as they are.
"""

from pathlib import Path
from typing import NamedTuple

import typer

from pipeline.commands.ask import doubts, shares, together
from pipeline.core.errors import Fail
from pipeline.core.facts import Conclusion
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


class Entry(NamedTuple):
    """A question on the page; models are known by their names."""

    question: Question
    conclusion: str
    models: dict[str, Prediction]
    written: dict[str, str]  # model -> its written answer
    filters: list[str]  # keys of FILTERS that it passes


def scores(prediction: Prediction) -> dict[Label, float]:
    """Label -> log-probability."""
    return dict(zip(LABELS, prediction.log_probabilities, strict=True))


def passed(models: dict[str, Prediction]) -> list[str]:
    """The keys of FILTERS that a question passes."""
    tuned, merged = models[TUNED], models.get(MERGED)
    passes = {
        "wrong": tuned.prediction != tuned.label,
        "unsure": bool(doubts(scores(tuned))),
        "tuning": tuned.prediction != models[BASE].prediction,
        "quantization": merged is not None and tuned.prediction != merged.prediction,
    }
    return [name for name in FILTERS if passes[name]]


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
    written: dict[str, dict[str, str]] = {question.pmid: {} for question in questions}
    for row in read_answers(ANSWERS):
        written.setdefault(row.pmid, {})[names[row.model]] = row.text
    found: list[Entry] = []
    for question in questions:
        asked = {model: rows[question.pmid] for model, rows in models.items()}
        found.append(Entry(question, conclusions[question.pmid], asked, written[question.pmid], passed(asked)))
    return found


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
        **{function.__name__: function for function in (abstract_of, scores, shares, together)},
    )
    with writing(output) as partial:
        partial.write_text(page, encoding="utf-8")
    typer.echo(f"Open {output} in a browser; no network is needed. It holds the texts of the questions.")
