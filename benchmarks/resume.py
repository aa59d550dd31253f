"""Kill a training and let it go on: what comes of it against a training that nobody killed.

    python -m benchmarks.resume --project rehearsal --whole rehearsal --work DIR --after 30

Runs the `train` stage of copies in --work of a project whose `format` and `base` stages have run: one is killed once
its checkpoint after step --after is whole, then run again. It is compared with the project --whole, trained with the
same parameters (its log, and its adapter if that is there), or else with a copy that is left alone. --set changes
parameters of the `train` section. Prints a JSON object; `reproducible_steps` says for how many steps, from the first,
the two runs' logs agree to the last digit: those before the kill tell whether this card repeats itself at all.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ADAPTER = Path("models/adapter/adapter_model.safetensors")


def copy(project: Path, directory: Path, changes: list[str]) -> Path:
    """What `train` reads, in a directory of its own."""
    for name in ("pipeline", "data/formatted", "models/base"):
        shutil.copytree(project / name, directory / name, dirs_exist_ok=True)
    yaml = YAML()
    params: Any = yaml.load(project / "params.yaml")
    params["train"] |= {name: yaml.load(value) for name, value in (item.split("=", 1) for item in changes)}
    yaml.dump(params, directory / "params.yaml")
    shutil.copyfile(project / "dvc.yaml", directory / "dvc.yaml")
    return directory


def start(directory: Path, log: Path) -> subprocess.Popen[bytes]:
    """The `train` stage's command of dvc.yaml, in a process group of its own."""
    command = YAML(typ="safe").load(directory / "dvc.yaml")["stages"]["train"]["cmd"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            shell=True,
            cwd=directory,
            env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def train(directory: Path, log: Path) -> float:
    """Run the stage to its end; its seconds."""
    began = time.monotonic()
    if start(directory, log).wait() != 0:
        sys.exit(f"resume: train failed in {directory}; see {log}")
    return round(time.monotonic() - began, 1)


def kill(directory: Path, log: Path, step: int) -> float:
    """Run the stage until its checkpoint after `step` is whole, and kill it; the seconds that it had."""
    began = time.monotonic()
    process = start(directory, log)
    while not list(directory.glob(f".checkpoints/*/checkpoint-{step}/complete.json")):
        if process.poll() is not None:
            sys.exit(f"resume: train ended before it could be killed; see {log}")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return round(time.monotonic() - began, 1)


def log_rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics" / "train_log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def adapter_difference(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference of two adapters' weights, and the largest weight."""
    from safetensors.numpy import load_file

    first, second = load_file(one / ADAPTER), load_file(other / ADAPTER)
    assert first.keys() == second.keys()
    differences = (float(abs(first[name] - second[name]).max()) for name in first)
    return max(differences), max(float(abs(values).max()) for values in first.values())


def compare(whole: Path, killed: Path) -> dict[str, Any]:
    """The resumed run's log and adapter against the whole run's."""
    rows, expected = log_rows(killed), log_rows(whole)
    same = [row == other for row, other in zip(rows, expected, strict=True)]
    losses = [abs(float(row["loss"]) - float(other["loss"])) for row, other in zip(rows, expected, strict=True)]
    resources = json.loads((killed / "metrics" / "train_resources.json").read_text(encoding="utf-8"))
    after = resources["resumed_after_step"]
    figures: dict[str, Any] = {}
    if (whole / ADAPTER).exists():
        difference, largest = adapter_difference(whole, killed)
        figures = {
            "adapter_files_equal": (whole / ADAPTER).read_bytes() == (killed / ADAPTER).read_bytes(),
            "adapter_max_difference": difference,
            "adapter_largest_weight": largest,
        }
    return {
        "steps_logged_once_each": [row["step"] for row in rows] == [str(step) for step in range(1, len(rows) + 1)],
        "steps": len(rows),
        "all_finite": all(math.isfinite(float(row[name])) for row in rows for name in ("loss", "grad_norm")),
        "resumed_after_step": after,
        "reproducible_steps": same.index(False) if False in same else len(same),
        "loss_difference_before": max(losses[:after], default=0.0),
        "loss_difference_after": max(losses[after:], default=0.0),
        **figures,
        "peak_vram_reserved_mib": resources["peak_vram_reserved_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--whole", type=Path, help="a trained project; left out: a copy is trained, too")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--after", type=int, required=True, help="a multiple of train.save_steps")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True)
    figures: dict[str, Any] = {}
    whole = options.whole
    if not whole:
        whole = copy(options.project, work / "whole", options.set)
        figures["whole_s"] = train(whole, work / "whole.log")
    killed = copy(options.project, work / "killed", options.set)
    figures["killed_s"] = kill(killed, work / "killed.log", options.after)
    figures["resumed_s"] = train(killed, work / "resumed.log")
    backend = YAML(typ="safe").load(killed / "params.yaml")["train"]["backend"]
    print("resume:", json.dumps({"backend": backend, **compare(whole, killed), **figures}), flush=True)


if __name__ == "__main__":
    main()
