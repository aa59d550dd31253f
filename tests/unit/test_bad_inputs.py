"""Anything at all in a file that a person may edit: one sentence, or a value that is what it has to be."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import base, download, evaluate, quantize, reference, report, train
from pipeline import format as formatting
from pipeline.embedded.trials import records as trials
from pipeline.measures import COLUMNS, parse_predictions, read_predictions
from pipeline.merge import check_adapter
from pipeline.prompt import LABELS, PROTOCOLS, completion, prompt
from pipeline.records import read_examples, read_json, read_jsonl, write_jsonl
from pipeline.stage import Fail, read_section
from tests.conftest import ROOT, tried, yaml

CASES = int(os.environ.get("BAD_INPUTS", "40"))  # benchmarks/faults.py: many more
many = settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))

PROFILES = [yaml.load(path.read_text()) for path in sorted((ROOT / "profiles").glob("*.yaml"))]
LOADERS: dict[str, Callable[[], Any]] = {
    "download": download.load_params,
    "base": base.load_params,
    "format": lambda: formatting.Params.load("format"),
    "train": lambda: train.Params.load("train"),
    "quantize": lambda: quantize.Params.load("quantize"),
    "evaluate": lambda: evaluate.Params.load("evaluate"),
    "reference": lambda: reference.Params.load("reference"),
    "report": lambda: report.Params.load("report"),
}
RECORDS, TRUTH = trials(1, 20, 20)

texts = st.text(max_size=8) | st.sampled_from(["", " ", "yes", "\ud800", "\u2028", "<|eot_id|>", "1e-4", "../x", "nan"])
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([0, -1, 10**400, 2**63, 1e308])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def refused(kind: str, action: Callable[[], Any], *secret: str) -> Any:
    """What `action` returns; None if it raised one clean sentence that holds none of `secret`. Anything else fails."""
    with tried("bad_inputs", kind) as seen:
        try:
            return action()
        except Fail as error:
            seen.append(str(error))
        assert seen[0].isprintable()
        assert not [text for text in secret if text in seen[0]]
        return None


@st.composite
def damaged(draw: st.DrawFn, whole: str) -> bytes:
    """A text with a piece cut out, replaced or doubled."""
    body = whole.encode()
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + draw(st.sampled_from([0, 1, 3, 40, len(body)])))))
    piece = draw(
        st.binary(max_size=6)
        | texts.map(lambda text: text.encode(errors="surrogatepass"))
        | st.just(body[start:end] * 2)
    )
    return body[:start] + piece + body[end:]


def changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it, however deep, removed, renamed or replaced by anything."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: inner for name, inner in value.items() if name != key}
        match draw(st.sampled_from(["deeper", "deeper", "removed", "renamed", "added"])):
            case "removed":
                return rest
            case "renamed":
                return rest | {draw(texts): value[key]}
            case "added":
                return value | {draw(texts): draw(values)}
            case _:
                return value | {key: changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], changed(draw, value[i]), *value[i + 1 :]]
    return draw(values)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_what_nobody_changed_is_accepted():
    """Were it refused, the tests below would see refusals alone, and never what an accepted value has to be."""
    for profile in PROFILES:
        Path("params.yaml").write_text(json.dumps(profile))
        for stage, load in LOADERS.items():
            assert load().model_dump() == profile[stage]
    formatting.check_records(RECORDS, TRUTH)
    rows = [formatting.example(pmid, RECORDS[pmid], "system") for pmid in sorted(RECORDS)[:3]]
    write_jsonl(Path("train.jsonl"), rows)
    assert read_examples(Path("train.jsonl")) == rows
    Path("adapter_config.json").write_text(json.dumps(CONFIG))
    Path("trained_on.json").write_text(json.dumps(IDENTITY))
    assert check_adapter(Path(), IDENTITY) == CONFIG


@many
@given(st.data())
@pytest.mark.parametrize("stage", LOADERS)
@pytest.mark.usefixtures("here")
def test_parameters(stage: str, data: st.DataObject):
    section = changed(data.draw, data.draw(st.sampled_from(PROFILES))[stage])
    Path("params.yaml").write_text(json.dumps({stage: section}, allow_nan=True), errors="replace")
    params = refused("params.yaml: values", LOADERS[stage])
    if params is not None:  # only what the file says, and of the type that it says
        written = read_section(stage)
        found = params.model_dump()
        assert found == written
        assert all(type(value) in {type(written[name]), float} for name, value in found.items())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.usefixtures("here")
def test_whole_profiles_are_accepted(profile: dict[str, Any]):
    Path("params.yaml").write_text(json.dumps(profile))
    assert {stage: load().model_dump() for stage, load in LOADERS.items()} == profile


@many
@given(body=damaged((ROOT / "profiles" / "micro.yaml").read_text()))
@pytest.mark.usefixtures("here")
def test_a_damaged_params_file(body: bytes):
    Path("params.yaml").write_bytes(body)
    for load in LOADERS.values():
        refused("params.yaml: text", load)


@many
@given(st.data())
def test_records(data: st.DataObject):
    pmid = data.draw(st.sampled_from(sorted(RECORDS)))
    records = RECORDS | {pmid: changed(data.draw, RECORDS[pmid])}
    truth = data.draw(st.sampled_from([TRUTH, TRUTH, changed(data.draw, TRUTH)]))
    text = RECORDS[pmid]["LONG_ANSWER"]
    if not isinstance(truth, dict):
        return
    if refused("records", lambda: [formatting.check_records(records, truth)], text) is not None:
        rows = [f"chat,{pmid},yes,-1.0,-2.0,-3.0,yes,yes,5" for pmid in records]
        (table,) = parse_predictions("\n".join([",".join(COLUMNS), *rows]), "tuned.csv").values()
        assert {row.pmid for row in table} == records.keys()  # what is scored can be read back
        for record in records.values():
            json.dumps([prompt(record, "system"), completion(record)], ensure_ascii=False).encode()
            assert record["final_decision"] in LABELS
        assert 0 < len(truth) < len(records)


@many
@given(
    body=damaged(json.dumps(RECORDS[min(RECORDS)]))
    | values.map(lambda value: json.dumps(value).encode())
    | st.just(b"[" * 100_000)
)
@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_json(read: Callable[[Path], Any], body: bytes):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file.json")
        path.write_bytes(body)
        refused("JSON and JSONL", lambda: [read(path)])


@many
@given(st.data())
def test_examples(data: st.DataObject):
    rows = [formatting.example(pmid, RECORDS[pmid], "system") for pmid in sorted(RECORDS)[:3]]
    rows[1] = changed(data.draw, rows[1])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "train.jsonl")
        write_jsonl(path, rows)
        accepted = refused("examples", lambda: read_examples(path), RECORDS[min(RECORDS)]["LONG_ANSWER"])
    for row in accepted or []:
        assert row["label"] in LABELS
        assert all(isinstance(turn["content"], str) for turn in row["prompt"] + row["completion"])
        json.dumps([row["pmid"], row["prompt"], row["completion"]], ensure_ascii=False).encode()


CONFIG = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 16,
    "use_dora": False,
    "rank_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
}
IDENTITY = {"files": [{"name": "model.safetensors", "size": 3, "sha256": "0" * 64}]}


@many
@given(st.data())
def test_adapter_configs(data: st.DataObject):
    config, identity = CONFIG, IDENTITY
    if data.draw(st.booleans()):
        config = changed(data.draw, CONFIG)
    else:
        identity = changed(data.draw, IDENTITY)
    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "trained_on.json").write_text(json.dumps(identity))
        accepted = refused("adapter configs", lambda: check_adapter(adapter, IDENTITY))
    if accepted is not None:
        assert identity["files"] == IDENTITY["files"]
        assert accepted["peft_type"] == "LORA"
        assert type(accepted["r"]) in {int, float}
        assert type(accepted["lora_alpha"]) in {int, float}
        assert 0 < accepted["lora_alpha"] / accepted["r"] < float("inf")


def table() -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [
        [protocol, pmid, label, "-1.0", "-2.0", "-3.0", "yes", "yes" if protocol == "chat" else "", "5"]
        for protocol in PROTOCOLS
        for pmid, label in zip("789", LABELS, strict=True)
    ]
    writer.writerows([COLUMNS, *rows])
    return text.getvalue()


@many
@given(body=damaged(table()))
@example(body=table().encode())
def test_predictions(body: bytes):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tuned.csv")
        path.write_bytes(body)
        tables = refused("predictions", lambda: read_predictions(path))
    assert tables or body != table().encode()
    for protocol, rows in (tables or {}).items():
        assert protocol in PROTOCOLS
        assert len({row.pmid for row in rows}) == len(rows)
        assert all({row.label, row.prediction} <= set(LABELS) for row in rows)
