"""The test questions only measure: nothing that makes or chooses a model can see their answers."""

import json
from pathlib import Path

from tests.conftest import ROOT, run_stage, stages

MEASURING = {"evaluate", "reference", "baseline", "report"}


def test_only_measuring_stages_read_test_questions_or_what_was_answered() -> None:
    graph = stages(ROOT)
    answers = {"data/formatted/test.jsonl", "metrics/predictions/tuned.csv", "metrics/predictions/base.csv"}
    written = {
        path
        for stage in MEASURING
        for kind in ("outs", "metrics", "plots")
        for entry in graph[stage].get(kind, [])
        for path in ([entry] if isinstance(entry, str) else entry)
    }
    assert answers - {"data/formatted/test.jsonl"} <= written
    for stage in graph.keys() - MEASURING:
        for dep in graph[stage]["deps"]:  # nor a directory that one of them lies in
            assert not [path for path in answers | written if Path(path).is_relative_to(dep)], (stage, dep)
        assert "test.jsonl" not in graph[stage]["cmd"]


def test_other_answers_to_the_test_questions_make_the_same_model(micro: Path, project: Path) -> None:
    raw = project / "data" / "raw"
    records, truth = (json.loads((raw / name).read_text()) for name in ("ori_pqal.json", "test_ground_truth.json"))
    other = {"yes": "no", "no": "maybe", "maybe": "yes"}
    for pmid, label in truth.items():
        truth[pmid] = other[label]
        records[pmid] |= {"final_decision": other[label], "LONG_ANSWER": "Nothing of the kind."}
    (raw / "ori_pqal.json").write_text(json.dumps(records))
    (raw / "test_ground_truth.json").write_text(json.dumps(truth))
    for stage in ("format", "train", "merge", "quantize"):
        assert run_stage(project, stage).returncode == 0
    test = Path("data/formatted/test.jsonl")
    assert (project / test).read_bytes() != (micro / test).read_bytes()
    for name in (
        "data/formatted/train.jsonl",
        "data/formatted/validation.jsonl",
        "models/adapter/adapter_model.safetensors",
        "models/medical-reasoner.gguf",
        "metrics/train.json",
        "metrics/train_log.csv",
    ):
        assert (project / name).read_bytes() == (micro / name).read_bytes(), name
