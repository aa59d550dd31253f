"""The embedded default is a fair miniature: what `dvc repro` must reach on profiles/tiny.yaml, with four seeds."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import copy_project, run_stage, set_params, stages

LABELS = ("yes", "no", "maybe")


def metrics(directory: Path, name: str) -> dict[str, float]:
    return json.loads((directory / "metrics" / f"{name}.json").read_text())


def run(directory: Path, *names: str) -> None:
    for name in names:
        done = run_stage(directory, name)
        assert done.returncode == 0, done.stderr


def check_tuned(directory: Path) -> None:
    """What every training seed must reach."""
    figures, tuned = metrics(directory, "compare"), metrics(directory, "evaluate")["chat"]
    assert figures["tuned_accuracy"] >= 0.80
    assert figures["tuned_minus_base_accuracy"] >= 0.25
    assert figures["tuned_minus_base_accuracy_low"] > 0
    assert all(tuned[f"recall_{label}"] >= 0.5 for label in LABELS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_project(tmp_path_factory.mktemp("tiny") / "project", "tiny")
    run(directory, *stages(directory))
    return directory


@pytest.mark.slow
def test_the_base_knows_its_own_questions_and_all_three_words(tiny: Path):
    assert metrics(tiny, "base")["heldout_accuracy"] >= 0.9
    untuned = metrics(tiny, "baseline")["chat"]
    assert all(untuned[f"predicted_{label}"] >= 0.05 for label in LABELS)


@pytest.mark.slow
def test_the_task_is_no_matter_of_counting_words(tiny: Path):
    assert metrics(tiny, "baseline")["tfidf_accuracy"] < 0.65
    counts = Counter(row["label"] for row in map(json.loads, (tiny / "data/formatted/test.jsonl").open()))
    assert counts == {"yes": 276, "no": 169, "maybe": 55}


@pytest.mark.slow
def test_the_default_seed(tiny: Path):
    check_tuned(tiny)


@pytest.mark.slow
def test_quantization_changes_few_answers(tiny: Path):
    figures = metrics(tiny, "compare")
    assert figures["tuned_minus_merged_changed"] <= 0.03 * figures["questions"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_another_seed(tiny: Path, seed: int):
    set_params(tiny, "train", seed=seed)
    run(tiny, "train", "merge", "quantize", "evaluate", "reference", "report")
    check_tuned(tiny)
