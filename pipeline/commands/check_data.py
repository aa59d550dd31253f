"""Examine a question file as the pipeline will, and list every problem.

FILE has records in PubMedQA's schema (PMID -> record), TEST maps the PMIDs of the test questions to yes, no or maybe.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.dataset import read_dataset
from pipeline.core.errors import Fail
from pipeline.core.labels import LABELS


def main(
    file: Annotated[Path, typer.Argument(help="Records, as ori_pqal.json.")],
    test: Annotated[Path | None, typer.Argument(help="Test questions.")] = None,
) -> None:
    """Print the number of questions by split and answer, or all problems."""
    test = test or file.with_name("test_ground_truth.json")
    for path in (file, test):
        if not path.is_file():
            raise Fail(f"{path} is no file; name the records, and after them the test questions")
    dataset = read_dataset(file, test, str(file), str(test))
    for split, inside in {"test": True, "training and validation": False}.items():
        labels = Counter(
            record.final_decision for pmid, record in dataset.records.items() if (pmid in dataset.test) == inside
        )
        counts = ", ".join(f"{labels[label]} {label}" for label in LABELS)
        typer.echo(f"{split}: {labels.total()} questions ({counts})")
    typer.echo("No problems. Lengths in tokens depend on the base: `dvc repro format` checks them.")
