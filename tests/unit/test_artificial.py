"""Artificial questions: what is left out and counted, and how the file is checked."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.pretrain import FILE, SCHEMA
from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.core.source import Source
from pipeline.models.directory import TINY_BASE
from pipeline.stages.artificial import COUNTS, main, read_records
from pipeline.stages.pretrain import main as pretrain
from tests.conftest import ROOT, yaml
from tests.hub import COMMIT, serve

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
SOURCE = Source(simulated=False, name="", licence="", dataset="", records="mine.json", test_ground_truth="test.json")


def row(pmid: int, question: str = "Is it so?", text: str = "It was.", **changes: Any) -> dict[str, Any]:
    context = {"contexts": [text], "labels": ["RESULTS"], "meshes": ["Humans"]}
    values = {"pubid": pmid, "question": question, "context": context, "long_answer": "It is.", "final_decision": "yes"}
    return values | changes


def record(text: str, label: str = "yes") -> dict[str, Any]:
    return {
        "QUESTION": "Which one?",
        "CONTEXTS": [text],
        "LABELS": ["AIM"],
        "LONG_ANSWER": "It does.",
        "final_decision": label,
    }


ROWS = [
    row(1),
    row(9001),  # a test question's PMID
    row(2, text="Before " + " ".join(WORDS[:13]).upper() + "."),  # thirteen words of a test question
    row(3, text=" ".join(WORDS[:12])),  # twelve
    row(4, long_answer=" ".join(WORDS)),  # the conclusion is no part of question and abstract
    row(5, question=" "),
    row(6, final_decision="perhaps"),
    row(7, text="long " * 900),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that runs the stage on rows from a local hub; it returns the examples and the counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.models.hub.time.sleep", lambda seconds: None)
    raw = tmp_path / "raw"
    raw.mkdir()
    (tmp_path / "system_prompt.txt").write_text("Be exact.")
    (raw / "source.json").write_text(SOURCE.model_dump_json())
    records = {
        "8001": record("a"),
        "8002": record("b", "no"),
        "9001": record(" ".join(WORDS)),
        "9002": record("c", "no"),
    }
    (raw / "ori_pqal.json").write_text(json.dumps(records))
    (raw / "test_ground_truth.json").write_text(json.dumps({"9001": "yes", "9002": "no"}))
    params = yaml.load((ROOT / "profiles/micro.yaml").read_text())
    about = {"source": "hub", "repo_id": "local/artificial", "revision": COMMIT, "file": FILE}
    with serve() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )

        def run(rows: list[dict[str, Any]] | bytes) -> tuple[list[Example], dict[str, int]]:
            body = rows
            if isinstance(rows, list):
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "made.parquet")
                body = (tmp_path / "made.parquet").read_bytes()
            server.add_data_set("local/artificial", FILE, body)  # pyright: ignore
            (tmp_path / "params.yaml").write_text(json.dumps({"pretrain": params["train"] | about}))
            names = ("raw", TINY_BASE, "system_prompt.txt", "out.jsonl", "counts.json", "resources.json")
            main(*map(Path, names))
            return read_rows(Path("out.jsonl"), Example), json.loads(Path("counts.json").read_text())

        yield run


def test_what_shares_pmid_or_thirteen_words_with_a_test_question_is_left_out_and_counted(run: Any):
    examples, counts = run(ROWS)
    assert [example.pmid for example in examples] == ["1", "3", "4"]
    assert counts == dict(zip(COUNTS, (8, 2, 1, 1, 1, 3), strict=True))
    assert examples[0].text == ""
    assert 0 < examples[0].prompt_tokens < len(examples[0].input_ids) <= 1024


def test_a_file_with_nothing_to_train_on_and_a_file_of_another_kind_leave_no_output(run: Any):
    for rows, words in ((ROWS[1:3], "none of its 2 questions is usable"), (b"PAR1 no", "not a parquet file")):
        shutil.rmtree("hub", ignore_errors=True)
        with pytest.raises(Fail, match=rf"pretrain\.file: .*{words}"):
            run(rows)
        assert not Path("out.jsonl").exists()


def test_a_damaged_file_in_the_hubs_cache_is_named(run: Any):
    run(ROWS[:1])
    (blob,) = (path for path in Path("hub").rglob("blobs/*"))
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(Fail, match="differs from the hub's file; remove it"):
        run(ROWS[:1])


def test_other_columns_are_refused(tmp_path: Path):
    pq.write_table(pa.table({"pubid": [1]}), tmp_path / "x.parquet")
    with pytest.raises(Fail, match=r"pretrain\.file"):
        list(read_records(tmp_path / "x.parquet", Counter()))


def test_without_a_first_phase_both_stages_write_empty_outputs_and_fetch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("pretrain:\n  source: none\n")
    monkeypatch.setattr("pipeline.stages.artificial.fetch", None)
    main(*map(Path, ("raw", "base", "s.txt", "out.jsonl", "counts.json", "r.json")))
    assert (Path("out.jsonl").read_bytes(), json.loads(Path("counts.json").read_text())) == (
        b"",
        dict.fromkeys(COUNTS, 0),
    )
    pretrain(*map(Path, ("out.jsonl", "v.jsonl", "base", "pretrained", "m.json", "log.csv", "memory.csv", "r.json")))
    assert [path.name for path in Path("pretrained").iterdir()] == ["none.json"]
    assert Path("log.csv").read_text() == "step,loss,validation_loss,learning_rate,grad_norm\n"
