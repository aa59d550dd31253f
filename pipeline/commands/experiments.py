"""Experiments: the finished ones of this commit -> mean and spread over training seeds, for each set of parameters.

Only what `train` measures is read, its validation loss above all. A choice between experiments is made on that; the
test questions measure the one that was chosen, so none of their figures is shown here (docs/sweeps.md).
"""

import json
import subprocess
import sys
from statistics import mean, stdev
from typing import Any

import typer

from pipeline.core.stage import Fail, run

METRICS = "metrics/train.json"
SEED = "train.seed"
COLUMNS = "{:{width}}  {:>7}  {:16}{:>10}{:>10}{:>10}{:>10}"

Leaves = dict[str, Any]


def leaves(values: Any, path: str = "") -> Leaves:
    """Dotted path -> value of all that nested mappings hold; a list is one value."""
    if not isinstance(values, dict):
        return {path: values}
    inner = [leaves(value, f"{path}.{key}".strip(".")) for key, value in values.items()]
    return {key: value for found in inner for key, value in found.items()}


def groups(shown: list[dict[str, Any]]) -> dict[str, dict[Any, Leaves]]:
    """`dvc exp show --json` as: the parameters that differ from the commit's own -> training seed -> metrics.

    An experiment counts unless it is queued, running or failed; one that was repeated counts once.
    """
    found: dict[str, dict[Any, Leaves]] = {}
    for commit in shown:
        for experiment in commit["experiments"] or []:
            state = (experiment["executor"] or {"state": "success"})["state"]
            data = experiment["revs"][0]["data"] if experiment["revs"] else None
            if state != "success" or not data or METRICS not in data["metrics"]:
                continue
            own, params = (leaves(one["params"]["params.yaml"]["data"]) for one in (commit["data"], data))
            changed = [f"{name}={value}" for name, value in params.items() if own.get(name) != value]
            group = " ".join(change for change in changed if not change.startswith(f"{SEED}="))
            metrics = leaves(data["metrics"][METRICS]["data"])
            found.setdefault(group or "as committed", {})[params[SEED]] = metrics
    return found


def table(found: dict[str, dict[Any, Leaves]]) -> str:
    """A row for each set of parameters and metric; the standard deviation is a sample's, so one seed has none."""
    width = max(map(len, ["parameters", *found]))
    lines = [COLUMNS.format("parameters", "seeds", "metric", "mean", "std", "min", "max", width=width)]
    for group, seeds in sorted(found.items()):
        for metric in sorted({name for metrics in seeds.values() for name in metrics}):
            values = [metrics[metric] for metrics in seeds.values() if metric in metrics]
            spread = f"{stdev(values):.4f}" if len(values) > 1 else "-"
            figures = [f"{mean(values):.4f}", spread, f"{min(values):.4f}", f"{max(values):.4f}"]
            lines.append(COLUMNS.format(group, len(values), metric, *figures, width=width).rstrip())
    return "\n".join(lines)


def main() -> None:
    """Print mean, standard deviation, minimum and maximum over the seeds of this commit's finished experiments."""
    show = subprocess.run([sys.executable, "-m", "dvc", "exp", "show", "--json"], stdout=subprocess.PIPE, check=False)
    if show.returncode != 0:
        raise Fail("dvc could not list the experiments; its lines above say why; run `dvc exp show` by itself")
    found = groups(json.loads(show.stdout))
    if not found:
        raise Fail(
            "no experiment of this commit has finished; queue some with "
            "`dvc exp run --queue -S train.seed=1,2,3 train`, then `dvc queue start -j 2`"
        )
    typer.echo(table(found))


if __name__ == "__main__":
    run(main)
