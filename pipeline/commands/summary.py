"""Summary: what a run has come to, in a few lines: `make repro` ends with it."""

import subprocess
from pathlib import Path
from textwrap import fill
from typing import Any

import typer

from pipeline.core.records import read_json
from pipeline.core.stage import Fail, run
from pipeline.reporting.compare import results, verdict
from pipeline.reporting.release import SIMULATED

COMPARISON = Path("metrics/compare.json")
GGUF = Path("models/medical-reasoner.gguf")
# Memory, time and speed are never the same twice.
RESULTS = ["metrics", ":(exclude)metrics/*_resources.json", ":(exclude)metrics/train_memory.csv"]

NEXT = """Next
  make plots                                  every plot on a page, no network
  models/release/RUN.md                       LM Studio, Ollama, llama.cpp
  cp profiles/tiny-pubmedqa.yaml params.yaml  the real questions"""


def committed() -> str:
    """Whether metrics and predictions are those of the last commit, in a sentence or two."""
    try:
        git = subprocess.run(["git", "status", "--porcelain", "--", *RESULTS], capture_output=True, check=False)
    except FileNotFoundError:
        return "The results were not compared with committed ones: git is not installed."
    if git.returncode != 0:
        return "The results were not compared with committed ones: this is no git repository."
    if not git.stdout:
        return "The results equal the committed ones."
    return (
        "The results differ from the committed ones (`git diff HEAD -- metrics`). A change of code or parameters does "
        "that, and so can another CPU, which rounds differently: dvc.lock changes with them."
    )


def summary(figures: dict[str, Any], comparison: str) -> str:
    """The results as plain text of at most 80 columns; `comparison` is what `committed` says."""
    questions, interval = f"{figures['questions']} test questions", f"{figures['confidence']:.0%} interval"
    table = [f"{questions:30}{'accuracy':>9}{interval:>18}{'macro-F1':>11}"]
    for name, share, low, high, f1 in results(figures):
        interval = f"{low:.1%} to {high:.1%}"
        table.append(f"{name:30}{share:9.1%}{interval:>18}{f1:11.1%}")
    paragraphs = [
        "\n".join(table),
        *([SIMULATED] if figures["simulated"] else []),
        fill(verdict(figures, "tuned", "base"), 79),
        fill(f"{GGUF}: {figures['gguf_bytes'] / 1e6:,.1f} MB, ready for LM Studio, Ollama and llama.cpp.", 79),
        fill(comparison, 79),
        NEXT,
    ]
    return "\n\n".join(paragraphs)


def main() -> None:
    """Print the results of the last run."""
    if not COMPARISON.is_file():
        raise Fail(f"{COMPARISON} is missing: the pipeline has not run to its end; run `make repro`")
    typer.echo("\n" + summary(read_json(COMPARISON), committed()))


if __name__ == "__main__":
    run(main)
