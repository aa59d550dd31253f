"""Comment: what a branch does to the results, as Markdown for its pull request, from what is in git."""

import json
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import typer

from pipeline.commands.cli import dvc
from pipeline.commands.gate import Judgement, at, commit_of, judge
from pipeline.core.files import read_text
from pipeline.core.labels import LABELS
from pipeline.reporting import comparison as words
from pipeline.reporting.pages import render
from pipeline.scoring.measures import Interval


class Row(NamedTuple):
    """A row of a table: the figure at the main branch, here, and their difference; None if unknown."""

    title: str
    main: float | None
    here: float | None
    difference: Interval | None = None
    form: str = "{:.1%}"


def quality(judgement: Judgement) -> list[Row]:
    """Accuracy, macro-F1 and recalls of the tuned model."""
    main, here, found = judgement.main, judgement.here, judgement.minus_main
    new, old, by = here.tuned, main and main.tuned, [(label, attrgetter(label)) for label in LABELS]
    return [
        Row("accuracy", old and old.accuracy.value, new.accuracy.value, found and found.accuracy),
        Row("macro-F1", old and old.macro_f1, new.macro_f1, found and found.macro_f1),
        *(
            Row(f"recall of {name}", old and of(old.recall), of(new.recall), found and of(found.recall))
            for name, of in by
        ),
        Row("calibration error", old and old.renormalised.calibration_error, new.renormalised.calibration_error),
        Row("accuracy of the untuned base", main and main.base.accuracy.value, here.base.accuracy.value),
    ]


def cost(commit: str) -> list[Row]:
    """Losses, memory, time and size, as far as they were measured on either side."""
    rows: list[Row] = []
    for title, name, key, form in (
        ("validation loss", "train", "validation_loss", "{:.4f}"),
        ("training: peak VRAM, MiB", "train_resources", "peak_vram_reserved_mib", "{:,.0f}"),
        ("training: peak memory, MiB", "train_resources", "peak_rss_mib", "{:,.0f}"),
        ("training: time, s", "train_resources", "seconds", "{:,.0f}"),
        ("size of the GGUF, bytes", "compare", "gguf.bytes", "{:,.0f}"),
    ):
        path = Path("metrics", f"{name}.json")
        before, value = (value_at(text, key) for text in (at(commit, path), read_text(path) if path.is_file() else ""))
        if value or before:  # a training without a GPU has no VRAM
            rows.append(Row(title, before, value, form=form))
    return rows


def value_at(text: str, key: str) -> float | None:
    """The figure under a dotted path of keys in a metrics file; None if it is not there."""
    try:
        value: Any = json.loads(text)
    except ValueError:  # no file, or conflict markers
        return None
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def dvc_diff(kind: str, revision: str) -> list[str]:
    """The lines of the Markdown table of `dvc params diff` or `dvc metrics diff`; none if nothing differs."""
    header, rule, *rows = dvc(kind, "diff", "--md", revision).strip().splitlines() or ["", ""]
    return [header, rule, *sorted(rows)] if rows else []


def main(revision: str, pictures: str = "metrics/pictures") -> None:
    """Print the comment on this directory's results against REVISION's; --pictures: where its images are."""
    judgement = judge(revision)
    text = render(
        "comment.md.j2",
        words=words,
        judgement=judgement,
        revision=revision,
        quality=quality(judgement),
        cost=cost(commit_of(revision)),
        pictures=pictures,
        params=dvc_diff("params", revision),
        metrics=dvc_diff("metrics", revision),
    )
    typer.echo(text, nl=False)
