"""Repositories with a main branch and another one, made of made-up predictions: nothing is trained for them."""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.core.labels import LABELS
from pipeline.core.outputs import write_json
from pipeline.reporting.compare import compare
from pipeline.reporting.comparison import Comparison
from pipeline.scoring.measures import rounded
from pipeline.scoring.predictions import Prediction, Predictions, write_predictions
from tests.conftest import ROOT, copy_project
from tests.tables import REPORT, SUBJECT, answered, facts

QUESTIONS = 200
TUNED, BASE = (Path(f"metrics/predictions/{name}.csv") for name in ("tuned", "base"))


def git(directory: Path, *arguments: str) -> str:
    """What git prints, run in `directory` by a made-up author."""
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout


def commit(directory: Path, message: str) -> None:
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--allow-empty", "--message", message)


def table(wrong: Iterable[int], first: int = 1000) -> list[Prediction]:
    """Predictions of a model that answers all but the questions `wrong` rightly; PMIDs count up from `first`."""
    missed = set(wrong)
    return [
        answered(str(first + number), LABELS[number % 3], LABELS[(number + (number in missed)) % 3])
        for number in range(QUESTIONS)
    ]


def write(directory: Path, tuned: list[Prediction], base: list[Prediction], **metrics: dict[str, Any]) -> Comparison:
    """Put predictions and the metrics that follow from them into `directory`; `metrics` are further files."""
    tables: list[Predictions] = [{"chat": base}, {"chat": tuned}]
    compared = compare(SUBJECT, *tables, {}, facts(tuned), REPORT)
    write_predictions(directory / TUNED, tuned)
    write_predictions(directory / BASE, base)
    for name, value in {"compare": rounded(compared), **metrics}.items():
        write_json(directory / f"metrics/{name}.json", value)
    return compared


def repository(directory: Path) -> Path:
    """A project on its main branch: the tuned model is right on 160 of 200 questions, its base on 100."""
    copy_project(directory)
    for name in ("Makefile", ".gitignore", "constraints.txt"):
        shutil.copyfile(ROOT / name, directory / name)
    git(directory, "init", "--quiet", "--initial-branch=main")
    training = {"train": {"last_loss": 1.25, "validation_loss": 1.5}}
    memory = {"train_resources": {"peak_rss_mib": 900.0, "peak_vram_reserved_mib": 5400.0, "seconds": 60.0}}
    write(directory, table(range(40)), table(range(100)), **training, **memory)
    commit(directory, "main")
    git(directory, "switch", "--quiet", "--create", "change")
    return directory


def link_environment(directory: Path) -> None:
    """Give `directory` a .venv that is that of these tests and counts as set up, for its Makefile."""
    (directory / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "ready":
            (directory / ".venv" / entry.name).symlink_to(entry)
    (directory / ".venv" / "ready").touch()
