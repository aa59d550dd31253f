"""Sweep: mean and spread over training seeds of this commit's finished experiments, for each set of parameters.

Only what `train` measures is read, above all its validation loss. Experiments are chosen by that; test questions
measure the chosen one, so no figure of theirs is shown (docs/sweeps.md).
"""

import json
from statistics import mean, stdev
from typing import Any

import typer

from pipeline.commands.cli import dvc, require_clone
from pipeline.core.errors import Fail
from pipeline.reporting.pages import aligned

METRICS, SEED = "metrics/train.json", "train.seed"
# (parameters that differ from the commit's, metric) -> training seed -> value
Values = dict[tuple[str, str], dict[int, float]]


def parameters(data: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of the parameters of a commit or experiment."""
    sections: dict[str, dict[str, Any]] = data["params"]["params.yaml"]["data"]
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def finished(shown: list[dict[str, Any]]) -> Values:
    """The figures in the output of `dvc exp show --json`, without experiments that are queued, running or failed."""
    found: Values = {}
    for commit in shown:
        for experiment in commit["experiments"] or []:
            state = (experiment["executor"] or {"state": "success"})["state"]
            data = experiment["revs"][0]["data"] if experiment["revs"] else None
            if state != "success" or not data or METRICS not in data["metrics"]:
                continue
            own, params = parameters(commit["data"]), parameters(data)
            changed = [f"{name}={value}" for name, value in params.items() if name != SEED and own.get(name) != value]
            for metric, value in data["metrics"][METRICS]["data"].items():
                found.setdefault((" ".join(changed) or "as committed", metric), {})[params[SEED]] = value
    return found


def table(found: Values) -> str:
    """A line for each set of parameters and metric; one seed has no (sample) standard deviation."""
    rows = [["parameters", "seeds", "metric", "mean", "std", "min", "max"]]
    for (group, metric), seeds in sorted(found.items()):
        values = list(seeds.values())
        spread = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        middle, low, high = (f"{figure:.4f}" for figure in (mean(values), min(values), max(values)))
        rows.append([group, str(len(values)), metric, middle, spread, low, high])
    return "\n".join(aligned(rows))


def main() -> None:
    """Print the table."""
    require_clone()
    if not (found := finished(json.loads(dvc("exp", "show", "--json")))):
        raise Fail(
            "no experiment of this commit has finished; queue some with "
            "`dvc exp run --queue -S train.seed=1,2,3 train`, then `dvc queue start -j 2`"
        )
    typer.echo(table(found))
