"""The default is a fair miniature: what `dvc repro` must reach on profiles/tiny.yaml, with four seeds."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.labels import LABELS
from tests.conftest import copy_project, stages
from tests.stages.helpers import call, numbers, questions

pytestmark = pytest.mark.slow


def run(directory: Path, *names: str, **changes: Any) -> dict[str, Any]:
    """Run stages, the first with changed parameters; the comparison that the last one writes."""
    for name in names:
        assert call(directory, name, **(changes if name == names[0] else {})) == ""
    return numbers(directory / "metrics" / "compare.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_project(tmp_path_factory.mktemp("tiny") / "project", "tiny")
    run(directory, *stages(directory))
    return directory


def test_the_untuned_base_gives_every_label_and_counting_words_does_not_solve_the_task(tiny: Path) -> None:
    baseline = numbers(tiny / "metrics" / "baseline.json")
    assert all(baseline["chat"]["predicted"][label] >= 0.05 for label in LABELS)
    assert baseline["tfidf"]["accuracy"]["value"] < 0.65
    assert Counter(row.label for row in questions(tiny)) == {"yes": 276, "no": 169, "maybe": 55}


@pytest.mark.parametrize("seed", [3407, 1, 2, 3])
def test_tuning_teaches_the_task_with_every_seed(tiny: Path, seed: int) -> None:
    found = run(tiny, "train", "merge", "quantize", "evaluate", "reference", "report", seed=seed)
    assert found["tuned"]["accuracy"]["value"] >= 0.80
    assert found["tuned_minus_base"]["accuracy"]["value"] >= 0.25
    assert found["tuned_minus_base"]["accuracy"]["low"] > 0
    assert all(found["tuned"]["recall"][label] >= 0.5 for label in LABELS)
    assert found["tuned_minus_merged"]["changed"] <= 0.03 * found["questions"]  # quantization
