"""Summary: the result of the last run in a few lines, with which `make repro` ends."""

import shutil
import subprocess
from pathlib import Path
from textwrap import fill
from typing import Any

import typer

from pipeline.core.errors import Fail
from pipeline.core.files import read_as
from pipeline.core.json_files import read_json_object
from pipeline.reporting.comparison import BASE, TUNED, Comparison, advice, listed, note, results, verdict, warnings
from pipeline.reporting.pages import aligned

COMPARISON, RESOURCES = Path("metrics/compare.json"), Path("metrics/evaluate_resources.json")
GGUF = Path("models/medical-reasoner.gguf")
# Memory, time and speed differ from run to run.
RESULTS = ["metrics", ":(exclude)metrics/*_resources.json", ":(exclude)metrics/train_memory.csv"]
NEXT = """Next
  make plots                                  every plot on a page, no network
  models/release/RUN.md                       LM Studio, Ollama, llama.cpp"""
REAL_DATA = "\n  cp profiles/smollm2-135m.yaml params.yaml   a real model, real questions"


def committed() -> str:
    """Whether metrics and predictions are those of the last commit."""
    command = ["git", "status", "--porcelain", "--", *RESULTS]
    git = subprocess.run(command, capture_output=True, check=False) if shutil.which("git") else None
    if git is None or git.returncode != 0:
        return "The results were not compared with committed ones: this is not a git repository."
    if not git.stdout:
        return "The results equal the committed ones."
    return (
        "The results differ from the committed ones (`git diff HEAD -- metrics`). A change of code or parameters does "
        "that, and so can another CPU, which rounds differently: dvc.lock changes with them."
    )


def summary(comparison: Comparison, against_git: str, speeds: dict[str, float]) -> str:
    """The results as plain text of at most 80 columns; `against_git` is what `committed` says.

    `speeds`: type of a file -> prompt tokens a second.
    """
    questions, interval = f"{comparison.questions} test questions", f"{comparison.confidence:.0%} interval"
    table = [[questions, "accuracy", interval, "macro-F1"]]
    for name, row in results(comparison).items():
        interval = f"{row.accuracy.low:.1%} to {row.accuracy.high:.1%}"
        table.append([name, f"{row.accuracy.value:.1%}", interval, f"{row.macro_f1:.1%}"])
    files = [["file", "MB", "accuracy", "interval", "changed", "KL", "VRAM, MiB", "card", "tok/s"]]
    for kind, file in listed(comparison).items():
        row = [
            kind,
            f"{file.bytes / 1e6:,.{1 if file.bytes < 1e9 else 0}f}",
            f"{file.accuracy.value:.1%}",
            f"{100 * file.accuracy.low:.1f}-{file.accuracy.high:.1%}",
            "" if file.changed is None else f"{file.changed}",
            "" if file.kl is None else f"{file.kl:.2g}",
            f"{file.vram_mib.tokens_2048:,.0f}" if file.vram_mib else "",
            f"{file.card_gb} GB" if file.card_gb else "",
            f"{speeds[kind]:,.0f}" if kind in speeds else "",
        ]
        files.append(row)
    kinds = list(listed(comparison)) or ["the model"]
    others = "; the other files are in models/quantized" if len(kinds) > 1 else ""
    paragraphs = [
        note(comparison),
        verdict(comparison, comparison.tuned_minus_base, TUNED, BASE),
        *warnings(comparison),
        f"{GGUF} is {kinds[0]}{others}, ready for LM Studio, Ollama and llama.cpp. {advice(comparison)}",
        against_git,
    ]
    end = NEXT + (REAL_DATA if comparison.simulated else "")
    tables = ["\n".join(aligned(rows)) for rows in (table, files)]
    return "\n\n".join([*tables, *(fill(paragraph, 79) for paragraph in paragraphs), end])


def speeds() -> dict[str, float]:
    """Type of a file -> tokens a second that `evaluate` scored; a run that found every answer in its journal has 0."""
    files: Any = read_json_object(RESOURCES).get("files", {}) if RESOURCES.is_file() else {}
    return {name: speed["tokens_per_second"] for name, speed in files.items() if speed["tokens_per_second"]}


def main() -> None:
    """Print the results of the last run."""
    if not COMPARISON.is_file():
        raise Fail(f"{COMPARISON} is missing, the pipeline has not finished; run `make repro`")
    typer.echo("\n" + summary(read_as(Comparison, COMPARISON), committed(), speeds()))
