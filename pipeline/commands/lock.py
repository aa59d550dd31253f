"""Lock: does dvc.lock agree with the code, the parameters and the results in git? No data and no cache are needed.

On a fresh clone `dvc repro --dry --allow-missing` names every stage that agrees. Its exit status and its lines
`Running stage` tell nothing there: a changed stage whose inputs were not pulled is an error that names a missing file.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
from ruamel.yaml import YAML

from pipeline.core.stage import Fail, run

DRY = ["repro", "--dry", "--allow-missing", "--keep-going"]


def stale(output: str, stages: list[str]) -> list[str]:
    """The stages that an output of `dvc repro --dry` does not call unchanged, in the order of dvc.yaml."""
    return [name for name in stages if f"Stage '{name}' didn't change, skipping" not in output]


def main() -> None:
    """Fail unless `dvc repro` would have nothing to do, were all data here."""
    try:
        pipeline: Any = YAML(typ="safe").load(Path("dvc.yaml"))  # pyright: ignore[reportUnknownMemberType]
    except FileNotFoundError:
        raise Fail("dvc.yaml is not in this directory; run this from the project's root") from None
    done = subprocess.run([sys.executable, "-m", "dvc", *DRY], capture_output=True, text=True, check=False)
    changed = stale(done.stdout, list(pipeline["stages"]))
    if changed == list(pipeline["stages"]) and (reason := re.search(r"ERROR: (.*)", done.stderr)):
        raise Fail(f"dvc.lock agrees with no stage ({reason[1]}); run `dvc repro`, then commit dvc.lock and metrics")
    if changed:
        raise Fail(
            f"dvc.lock does not agree with the code, parameters and results of {', '.join(changed)} (those that follow "
            "a changed stage are named too); run `dvc repro`, then commit dvc.lock and metrics"
        )
    typer.echo("lock: dvc.lock agrees with code, parameters and results.")


if __name__ == "__main__":
    run(main)
