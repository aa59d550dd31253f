"""Sweep: experiments as `dvc exp show --json` lists them become one row for each set of parameters and metric."""

from typing import Any

from pipeline.commands.sweep import finished, table


def shown(rate: float, seed: int, loss: float) -> dict[str, Any]:
    """One commit or experiment of DVC's list, its metrics of test questions included."""
    return {
        "params": {"params.yaml": {"data": {"train": {"seed": seed, "learning_rate": rate, "target_modules": ["q"]}}}},
        "metrics": {
            "metrics/train.json": {"data": {"validation_loss": loss}},
            "metrics/evaluate.json": {"data": {"accuracy": 0.9}},
        },
    }


def experiment(data: dict[str, Any] | None, state: str | None = "success") -> dict[str, Any]:
    return {"revs": [{"data": data}], "executor": state and {"state": state}}


EXPERIMENTS = [
    experiment(shown(1e-3, 1, 1.0)),
    experiment(shown(1e-3, 2, 2.0), None),  # in the workspace, or its task was removed from the queue
    experiment(shown(1e-3, 2, 2.0)),
    experiment(shown(1e-3, 3, 3.0)),
    experiment(shown(5e-3, 1, 7.0)),
    experiment(shown(1e-3, 4, 100.0), "running"),
    experiment(shown(1e-3, 5, 100.0), "queued"),
    experiment(None, "failed"),
]
COMMITS = [
    {"data": shown(1e-3, 3407, 50.0), "experiments": None},
    {"data": shown(1e-3, 3407, 50.0), "experiments": EXPERIMENTS},
]


def test_seeds_of_equal_parameters_are_one_group_and_unfinished_experiments_are_in_none() -> None:
    assert finished(COMMITS) == {
        ("as committed", "validation_loss"): {1: 1.0, 2: 2.0, 3: 3.0},
        ("train.learning_rate=0.005", "validation_loss"): {1: 7.0},
    }


def test_a_row_has_mean_sample_deviation_minimum_and_maximum_and_one_seed_has_no_deviation() -> None:
    assert [line.split() for line in table(finished(COMMITS)).splitlines()] == [
        ["parameters", "seeds", "metric", "mean", "std", "min", "max"],
        ["as", "committed", "3", "validation_loss", "2.0000", "1.0000", "1.0000", "3.0000"],
        ["train.learning_rate=0.005", "1", "validation_loss", "7.0000", "-", "7.0000", "7.0000"],
    ]
