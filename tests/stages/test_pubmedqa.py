"""The same pipeline on the real PubMedQA, few steps of it, from a mirror directory.

The mirror is the directory that PUBMEDQA_MIRROR names, or else ../shared/pubmedqa.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.lm_eval_agreement import disagreements, harness, ours, questions_of
from pipeline.core.records import read_jsonl
from pipeline.scoring.measures import read_predictions
from pipeline.stages.baseline import text_baselines
from pipeline.stages.format import SPLITS
from tests.conftest import ROOT, run_stage, yaml

MIRROR = Path(os.environ.get("PUBMEDQA_MIRROR", ROOT.parent / "shared" / "pubmedqa"))
# The files at commit 1cbae8e92f72f20c8d3747cbb3bf5bc53554d997 of github.com/pubmedqa/pubmedqa.
FILES = {
    "records": ("ori_pqal.json", "8b3276be8942ebbd77f3ddcda12c1749bf0e490045a736fd8438ee40cf37a41d"),
    "test_ground_truth": ("test_ground_truth.json", "939fe566f09017d13b1ca64d2ddfee0bc2374b366048152997669cccedc44d51"),
}

pytestmark = pytest.mark.skipif(
    not all((MIRROR / name).is_file() for name, _ in FILES.values()),
    reason="PubMedQA is not here: set PUBMEDQA_MIRROR to a directory with ori_pqal.json and test_ground_truth.json",
)


@pytest.fixture(scope="module")
def project(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the stages up to `evaluate` have run on PubMedQA, with the micro profile's base."""
    directory = Path(shutil.copytree(micro, tmp_path_factory.mktemp("pubmedqa") / "project"))
    params: dict[str, Any] = yaml.load((directory / "params.yaml").read_text())
    files = {key: {"name": name, "sha256": sha256} for key, (name, sha256) in FILES.items()}
    params["download"] = {"source": "files", "location": str(MIRROR), **files, "pqa_artificial": None}
    params["format"] |= {"validation_questions": 50}
    params["train"] |= {"max_length": 4096, "max_steps": 1}
    params["evaluate"] |= {"protocols": ["chat", "lm_eval"], "n_ctx": 4096, "max_new_tokens": 1}
    (directory / "params.yaml").write_text(json.dumps(params))  # JSON is YAML
    for stage in ("download", "format", "train", "merge", "quantize", "evaluate"):
        result = run_stage(directory, stage)
        assert result.returncode == 0, f"{stage}: {result.stderr}"
    return directory


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(project: Path, split: str) -> list[dict[str, Any]]:
    return read_jsonl(project / "data" / "formatted" / f"{split}.jsonl")


def test_the_official_500_are_the_test(project: Path):
    truth = read(MIRROR / "test_ground_truth.json")
    splits = {split: [row["pmid"] for row in rows_of(project, split)] for split in SPLITS}
    assert {split: len(part) for split, part in splits.items()} == {"train": 450, "validation": 50, "test": 500}
    assert splits["test"] == sorted(truth)
    assert len({pmid for part in splits.values() for pmid in part}) == 1000


def test_labels_and_overlap(project: Path):
    metrics = read(project / "metrics" / "format.json")
    counts = {split: [metrics[split][label] for label in ("yes", "no", "maybe")] for split in ("validation", "test")}
    assert counts == {"validation": [28, 17, 5], "test": [276, 169, 55]}
    assert metrics["test_overlap"] == {"8_grams": 57, "13_grams": 0}


def test_no_prompt_holds_its_own_answer(project: Path):
    records = read(MIRROR / "ori_pqal.json")
    for split in SPLITS:
        for row in rows_of(project, split):
            assert records[row["pmid"]]["LONG_ANSWER"] not in row["prompt"][-1]["content"], row["pmid"]


def test_the_rows_that_need_no_model(project: Path):
    train, validation, test = (project / "data" / "formatted" / f"{split}.jsonl" for split in SPLITS)
    metrics = text_baselines([train, validation], test)
    assert metrics["majority_accuracy"] == 0.552
    assert round(100 * metrics["majority_macro_f1"], 1) == 23.7
    assert 100 * metrics["tfidf_accuracy"] == pytest.approx(56.8, abs=1)
    assert 100 * metrics["tfidf_macro_f1"] == pytest.approx(35.8, abs=1)


@pytest.mark.parametrize(
    ("stage", "name"), [("evaluate", "tuned"), pytest.param("baseline", "base", marks=pytest.mark.slow)]
)
def test_a_prediction_for_every_test_question(project: Path, stage: str, name: str):
    if stage == "baseline":
        assert run_stage(project, stage).returncode == 0
    tables = read_predictions(project / "metrics" / "predictions" / f"{name}.csv")
    assert tables.keys() == {"chat", "lm_eval"}
    for protocol, rows in tables.items():
        assert len(rows) == read(project / "metrics" / f"{stage}.json")[protocol]["questions"] == 500
        assert {row.pmid: row.label for row in rows} == read(MIRROR / "test_ground_truth.json")


@pytest.mark.parametrize("questions", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_protocol_lm_eval_answers_as_the_harness_does(project: Path, tmp_path: Path, questions: int):
    """lm-evaluation-harness itself on the merged model, ours on the same weights, both in float32."""
    records = questions_of(project / "data" / "raw")[:questions]
    model = project / "models" / "merged"
    theirs, own = harness(model, records, tmp_path), ours(model, records, tmp_path)
    assert len(theirs) == questions
    assert np.array(own) == pytest.approx(np.array(theirs), abs=1e-3)
    assert disagreements(theirs, own, margin=1e-2) == 0
