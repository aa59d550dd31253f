"""The embedded default is a fair miniature: what `dvc repro` must reach on profiles/tiny.yaml, with four seeds."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.evaluate import Params, predict
from pipeline.gguf import convert
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
    figures, tuned = metrics(directory, "compare"), metrics(directory, "evaluate")
    assert figures["tuned_accuracy"] >= 0.80
    assert figures["accuracy_difference"] >= 0.25
    assert figures["accuracy_difference_low"] > 0
    assert all(tuned[f"recall_{label}"] >= 0.5 for label in LABELS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_project(tmp_path_factory.mktemp("tiny") / "project", "tiny")
    run(directory, *stages(directory))
    return directory


@pytest.mark.slow
def test_the_base_knows_its_own_questions_and_all_three_words(tiny: Path):
    assert metrics(tiny, "base")["heldout_accuracy"] >= 0.9
    untuned = metrics(tiny, "baseline")
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
def test_quantization_changes_few_answers(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny)
    wide, test = tmp_path / "wide.gguf", Path("data/formatted/test.jsonl")
    convert(Path("models/merged"), wide, {})
    params = Params.load("evaluate")
    shipped, full = (predict(path, test, params)[0] for path in (Path("models/medical-reasoner.gguf"), wide))
    assert sum(a[5] == b[5] for a, b in zip(shipped, full, strict=True)) >= 0.97 * len(full)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_another_seed(tiny: Path, seed: int):
    set_params(tiny, "train", seed=seed)
    run(tiny, "train", "merge", "quantize", "evaluate", "report")
    check_tuned(tiny)
