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

COMPARISON, RESOURCES = Path("metrics/compare.json"), Path("metrics/evaluate_resources.json")
GGUF = Path("models/medical-reasoner.gguf")
# Memory, time and speed differ from run to run.
RESULTS = ["metrics", ":(exclude)metrics/*_resources.json", ":(exclude)metrics/train_memory.csv"]
NEXT = """Next
  make plots                                  every plot on a page, no network
  models/release/RUN.md                       LM Studio, Ollama, llama.cpp"""
REAL_DATA = "\n  cp profiles/tiny-pubmedqa.yaml params.yaml  the real questions"


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
    table = [f"{questions:30}{'accuracy':>9}{interval:>18}{'macro-F1':>11}"]
    for name, row in results(comparison).items():
        interval = f"{row.accuracy.low:.1%} to {row.accuracy.high:.1%}"
        table.append(f"{name:30}{row.accuracy.value:9.1%}{interval:>18}{row.macro_f1:11.1%}")
    files = [f"{'file':10}{'MB':>9}{'accuracy':>10}{'changed':>9}{'KL':>9}{'VRAM, MiB':>11}{'card':>7}{'tokens/s':>11}"]
    for kind, file in listed(comparison).items():
        figures = [
            f"{file.bytes / 1e6:,.1f}",
            f"{file.accuracy.value:.1%}",
            "" if file.changed is None else f"{file.changed}",
            "" if file.kl is None else f"{file.kl:.2g}",
            f"{file.vram_mib.tokens_2048:,.0f}" if file.vram_mib else "",
            f"{file.card_gb} GB" if file.card_gb else "",
            f"{speeds[kind]:,.0f}" if kind in speeds else "",
        ]
        widths = (9, 10, 9, 9, 11, 7, 11)
        files.append(f"{kind:10}" + "".join(f"{text:>{width}}" for text, width in zip(figures, widths, strict=True)))
    paragraphs = [
        note(comparison),
        verdict(comparison, comparison.tuned_minus_base, TUNED, BASE),
        *warnings(comparison),
        f"{GGUF} is the first of these, the others are in models/quantized, ready for LM Studio, Ollama and llama.cpp. "
        f"{advice(comparison)}",
        against_git,
    ]
    end = NEXT + (REAL_DATA if comparison.simulated else "")
    tables = ["\n".join(rows) for rows in (table, files)]
    return "\n\n".join([*tables, *(fill(paragraph, 79) for paragraph in paragraphs), end])


def speeds() -> dict[str, float]:
    """Type of a file -> tokens a second that `evaluate` scored on this machine, as far as it ran here."""
    files: Any = read_json_object(RESOURCES).get("files", {}) if RESOURCES.is_file() else {}
    return {name: speed["tokens_per_second"] for name, speed in files.items()}


def main() -> None:
    """Print the results of the last run."""
    if not COMPARISON.is_file():
        raise Fail(f"{COMPARISON} is missing, the pipeline has not finished; run `make repro`")
    typer.echo("\n" + summary(read_as(Comparison, COMPARISON), committed(), speeds()))
