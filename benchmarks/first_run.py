"""Print a report of the last `dvc repro` to paste into an issue: hardware, versions, base, times, memory and metrics.

    make first-run
    python -m benchmarks.first_run rehearsal    the run in another directory, such as that of `make rehearsal`

It holds no text of any question and no path.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import card, hardware, versions
from benchmarks.tables import STAGES


def read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if the stage has not run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def rows(values: dict[str, Any], prefix: str = "") -> list[str]:
    """`| key | value |` for every plain value, nested ones by their dotted path."""
    lines: list[str] = []
    for key, value in sorted(values.items()):
        if isinstance(value, dict):
            lines += rows(value, f"{prefix}{key}.")
        else:
            lines.append(f"| {prefix}{key} | {value} |")
    return lines


def report(directory: Path) -> str:
    """The report of the project in `directory`, in Markdown."""
    metrics = directory / "metrics"
    params: Any = YAML(typ="safe").load((directory / "params.yaml").read_text(encoding="utf-8"))
    chosen = ("backend", "dtype", "per_device_train_batch_size", "gradient_accumulation_steps", "offload_embedding")
    lines = ["## First run", "", "| | |", "| --- | --- |", f"| hardware | {hardware()} |"]
    lines += [f"| CUDA card | {card() or 'none'} |", *(f"| {name} | {found} |" for name, found in versions().items())]
    base = params["base"].get("repo_id", params["base"]["source"])
    lines += [f"| base | {base} {params['base'].get('revision', '')} |"]
    lines += [f"| train.{name} | {params['train'].get(name)} |" for name in chosen]
    lines += ["", "| cost | |", "| --- | ---: |"]
    for stage in STAGES:
        lines += rows(read(metrics / f"{stage}_resources.json"), f"{stage}.")
    lines += ["", "| metric | |", "| --- | ---: |"]
    for name in ("train", "evaluate", "baseline", "compare"):
        lines += rows(read(metrics / f"{name}.json"), f"{name}.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(*sys.argv[1:])))
