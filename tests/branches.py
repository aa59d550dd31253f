"""Repositories with a main branch and another one, made of made-up answers: nothing is trained for them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conftest import ROOT, copy_project

from pipeline.reporting.compare import Params, compare
from pipeline.scoring.measures import COLUMNS, Prediction, parse_predictions
from pipeline.scoring.protocols import LABELS
from tests.tables import lines

QUESTIONS = 200
TUNED, BASE = (Path(f"metrics/predictions/{name}.csv") for name in ("tuned", "base"))
PARAMS = Params(bootstrap_samples=1000, seed=0, confidence=0.95, bins=10)


def git(directory: Path, *arguments: str) -> str:
    """What git prints, run in `directory` by a made-up author."""
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout


def commit(directory: Path, message: str) -> None:
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--allow-empty", "--message", message)


def table(wrong: Iterable[int], protocols: tuple[str, ...] = ("chat",), first: int = 1000) -> str:
    """A table of predictions of a model that answers all but the questions `wrong` rightly."""
    missed, rows = set(wrong), list[Prediction]()
    for number in range(QUESTIONS):
        label = LABELS[number % 3]
        answer = LABELS[(number + 1) % 3] if number in missed else label
        yes, no, maybe = (-0.5 if answer == other else -2.0 for other in LABELS)
        rows.append(Prediction(str(first + number), label, (yes, no, maybe), answer, answer, 7))
    return "\n".join([",".join(COLUMNS), *(line for protocol in protocols for line in lines(protocol, rows))]) + "\n"


def write(directory: Path, tuned: str, base: str, version: int = 1, **metrics: dict[str, Any]) -> None:
    """Put tables and the metrics that follow from them into `directory`; `metrics` are further files."""
    tables = [parse_predictions(text, "made up") for text in (base, tuned)]
    files = {
        "compare": compare(tables[0], tables[1], {}, PARAMS) | {"gguf_bytes": 1_000_000},
        "evaluate": {"chat": {"version": version}},
        **metrics,
    }
    for path, text in {TUNED: tuned, BASE: base}.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    for name, value in files.items():
        (directory / f"metrics/{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def repository(directory: Path) -> Path:
    """A project on its main branch: the tuned model is right on 160 of 200 questions, its base on 100."""
    copy_project(directory)
    for name in ("Makefile", ".gitignore", "constraints.txt"):
        shutil.copyfile(ROOT / name, directory / name)
    git(directory, "init", "--quiet", "--initial-branch=main")
    training = {"train": {"last_loss": 1.25, "validation_loss": 1.5}}
    memory = {"train_resources": {"peak_rss_mib": 900.0, "peak_vram_reserved_mib": 5400.0, "seconds": 60.0}}
    write(directory, table(range(40)), table(range(100), ("chat", "lm_eval")), **training, **memory)
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
