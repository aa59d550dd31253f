"""Kill a training and let it continue: compare the result with a training that was not killed.

    python -m benchmarks.resume --project rehearsal --work DIR --after 20 --name t4

Runs the stage `train` in two copies of a project whose stages `format` and `base` have run. One of them is killed when
its checkpoint after step --after (a multiple of SAVE_STEPS) is complete, and run again. --set changes parameters of the
section `train`. Steps with equal logs before the kill show whether the card repeats itself at all.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import LOGS, environment
from benchmarks.record import Figures, record
from pipeline.models.manifest import ADAPTER


def copy(project: Path, directory: Path, changes: list[str]) -> Path:
    """Copy what `train` reads."""
    for name in ("pipeline", "data/formatted", "models/base"):
        shutil.copytree(project / name, directory / name)
    for name in ("dvc.yaml", "pyproject.toml", "constraints.txt"):
        if (project / name).is_file():
            shutil.copyfile(project / name, directory / name)
    yaml = YAML()
    params: Any = yaml.load(project / "params.yaml")
    params["train"] |= {name: yaml.load(value) for name, value in (item.split("=", 1) for item in changes)}
    yaml.dump(params, directory / "params.yaml")
    return directory


def train(directory: Path, killed_after: int = 0) -> None:
    """Run the stage's command of dvc.yaml, or kill it as soon as its checkpoint after that step is complete."""
    command = YAML(typ="safe").load(directory / "dvc.yaml")["stages"]["train"]["cmd"]
    process = subprocess.Popen(command, shell=True, cwd=directory, env=environment(), start_new_session=True)
    while process.poll() is None:
        if killed_after and list(directory.glob(f".checkpoints/*/checkpoint-{killed_after}/complete.json")):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.01)
    if process.returncode or killed_after:
        sys.exit(f"resume: train failed in {directory}, or ended before its kill; its last lines are above")


def compare(whole: Path, killed: Path) -> dict[str, float]:
    """The log and the adapter of the resumed run against those of the whole run."""
    from safetensors.numpy import load_file

    runs = (whole, killed)
    logs = ((run / "metrics" / "train_log.csv").read_text(encoding="utf-8").splitlines() for run in runs)
    expected, rows = (list(csv.DictReader(lines)) for lines in logs)
    same = [row == other for row, other in zip(rows, expected, strict=True)]
    losses = [abs(float(row["loss"]) - float(other["loss"])) for row, other in zip(rows, expected, strict=True)]
    first, second = (load_file(run / "models" / "adapter" / ADAPTER) for run in runs)
    resources = json.loads((killed / "metrics" / "train_resources.json").read_text(encoding="utf-8"))
    after = resources["resumed_after_step"]
    return {
        "steps": len(rows),
        "resumed_after_step": after,
        "steps_with_equal_logs": same.index(False) if False in same else len(same),
        "loss_difference_before_kill": max(losses[:after]),
        "loss_difference_after_kill": max(losses[after:]),
        "adapter_max_difference": max(float(abs(first[name] - second[name]).max()) for name in first.keys() | second),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a new directory")
    parser.add_argument("--after", type=int, required=True)
    parser.add_argument("--name", required=True, help="in the figures' keys and the log's name")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True)
    whole, killed = (copy(options.project, work / name, options.set) for name in ("whole", "killed"))
    train(whole)
    train(killed, options.after)
    train(killed)
    found = compare(whole, killed)
    how = f"of {found['steps']} steps, killed after {found['resumed_after_step']}"
    figures: Figures = {f"train.resume.{options.name}.{key}": (found[key], how) for key in list(found)[2:]}
    changes = "".join(f" --set {change}" for change in options.set)
    command = f"python -m benchmarks.resume --project DIR --work DIR --after {options.after} --name {options.name}"
    text = "\n".join(f"{name}: {value}" for name, value in found.items())
    record(figures, command + changes, LOGS / f"resume_{options.name}.log", text=text)


if __name__ == "__main__":
    main()
