"""The same pipeline on the real PubMedQA, few steps of it.

Its files are in the directory that PUBMEDQA_MIRROR names, or else ../shared/pubmedqa.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lm_eval_agreement import disagreements, harness, ours, questions_of
from pipeline.scoring.predictions import read_predictions
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.stages.baseline import text_baselines
from tests.conftest import ROOT, yaml
from tests.stages.helpers import call, examples, numbers, questions, writable_copy

MIRROR = Path(os.environ.get("PUBMEDQA_MIRROR", ROOT.parent / "shared" / "pubmedqa"))
FILES = yaml.load((ROOT / "profiles" / "tiny-pubmedqa.yaml").read_text())["download"] | {"location": str(MIRROR)}

pytestmark = pytest.mark.skipif(
    not all((MIRROR / FILES[key]["name"]).is_file() for key in ("records", "test_ground_truth")),
    reason="PubMedQA is not here: set PUBMEDQA_MIRROR to a directory with ori_pqal.json and test_ground_truth.json",
)


@pytest.fixture(scope="session")
def formatted(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which `download` and `format` have run on PubMedQA, with the micro profile's base."""
    directory = writable_copy(micro, tmp_path_factory.mktemp("pubmedqa"))
    params = yaml.load((directory / "params.yaml").read_text()) | {"download": FILES}
    params["format"] |= {"validation_questions": 50}
    params["train"] |= {"max_length": 4096, "max_steps": 1}
    params["evaluate"] |= {"protocols": ["chat", "lm_eval"], "n_ctx": 4096, "max_new_tokens": 1}
    (directory / "params.yaml").write_text(json.dumps(params))  # JSON is YAML
    assert [call(directory, stage) for stage in ("download", "format")] == ["", ""]
    return directory


def test_the_official_500_are_the_test_and_no_prompt_holds_its_own_answer(formatted: Path) -> None:
    parts = [examples(formatted), examples(formatted, "validation"), questions(formatted)]
    assert [len(part) for part in parts] == [450, 50, 500]
    assert [row.pmid for row in parts[2]] == sorted(numbers(MIRROR / "test_ground_truth.json"))
    assert len({row.pmid for part in parts for row in part}) == 1000
    records = numbers(MIRROR / "ori_pqal.json")
    for row in parts[2]:
        prompts = [protocol.prompt(row) for protocol in PROTOCOLS.values()]
        asked = "".join(prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts)
        assert records[row.pmid]["LONG_ANSWER"] not in asked, row.pmid


def test_labels_and_overlap(formatted: Path) -> None:
    metrics = numbers(formatted / "metrics" / "format.json")
    counts = {split: [metrics[split][label] for label in ("yes", "no", "maybe")] for split in ("validation", "test")}
    assert counts == {"validation": [28, 17, 5], "test": [276, 169, 55]}
    assert metrics["test_overlap"] == {"8_grams": 57, "13_grams": 0}


@pytest.mark.slow
def test_the_text_baselines(formatted: Path) -> None:
    found = text_baselines([*examples(formatted), *examples(formatted, "validation")], questions(formatted))
    assert found["majority"]["accuracy"]["value"] == 0.552
    assert found["majority"]["macro_f1"] == pytest.approx(0.237, abs=5e-4)
    assert found["tfidf"]["accuracy"]["value"] == pytest.approx(0.568, abs=0.01)
    assert found["tfidf"]["macro_f1"] == pytest.approx(0.358, abs=0.01)


@pytest.mark.slow
def test_trained_on_it_protocol_lm_eval_answers_as_the_harness_does(formatted: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness itself on the merged model, ours on the same weights, both in float32."""
    assert [call(formatted, stage) for stage in ("train", "merge", "quantize", "evaluate")] == [""] * 4
    tables = read_predictions(formatted / "metrics" / "predictions" / "tuned.csv")
    assert {name: len(rows) for name, rows in tables.items()} == {"chat": 500, "lm_eval": 500}
    records, model = questions_of(formatted / "data" / "raw")[:100], formatted / "models" / "merged"
    theirs, own = harness(model, records, tmp_path), ours(model, "tiny", records, tmp_path)
    assert np.array(own) == pytest.approx(np.array(theirs), abs=1e-3)
    assert disagreements(theirs, own, margin=1e-2) == 0
