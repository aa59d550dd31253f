"""Lock: check that dvc.lock agrees with code, parameters and results; needs neither data nor cache.

On a fresh clone `dvc repro --dry --allow-missing` names every stage that agrees. Its exit status and its lines
`Running stage` say nothing there: a changed stage whose inputs were not pulled gives an error about a missing file.
"""

import re
import subprocess
import sys

import typer

from pipeline.commands.cli import require_clone
from pipeline.core.errors import Fail


def main() -> None:
    """Fail unless `dvc repro` would have nothing to do if all data were here."""
    require_clone()
    listed, done = (
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], capture_output=True, text=True, check=False)
        for command in ("stage list --name-only", "repro --dry --allow-missing --keep-going")
    )
    stages = listed.stdout.split()
    stale = [name for name in stages if f"Stage '{name}' didn't change, skipping" not in done.stdout]
    if stale == stages:
        reasons = [*re.findall(r"ERROR: (.*)", listed.stderr + done.stderr), "all of them changed"]
        raise Fail(f"dvc.lock agrees with no stage ({reasons[0]}); run `dvc repro`, then commit dvc.lock and metrics")
    if stale:
        raise Fail(
            f"dvc.lock does not agree with code, parameters or results of {', '.join(stale)} (stages after a changed "
            "one included); run `dvc repro`, then commit dvc.lock and metrics"
        )
    typer.echo("lock: dvc.lock agrees with code, parameters and results.")
