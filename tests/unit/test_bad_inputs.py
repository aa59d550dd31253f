"""Anything at all in a file that a person may edit: one sentence, or a value that is what it has to be."""

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.core.records import read_examples, read_json, read_jsonl, write_jsonl
from pipeline.core.stage import Fail, read_section
from pipeline.scoring.measures import COLUMNS, parse_predictions, read_predictions
from pipeline.scoring.protocols import LABELS, PROTOCOLS, completion, prompt
from pipeline.simulated.trials import records as trials
from pipeline.stages import base, download, evaluate, quantize, reference, report, train
from pipeline.stages import format as formatting
from pipeline.stages.merge import check_adapter
from tests.conftest import ROOT, tried, yaml

CASES = int(os.environ.get("BAD_INPUTS", "40"))  # benchmarks/faults.py: many more
many = settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))

MICRO = (ROOT / "profiles" / "micro.yaml").read_text()
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


def attempt(fault: str, action: Callable[[], Any], right: Callable[[Any], None], *secret: str) -> None:
    """Count a bad input, if `action` raises one clean sentence with none of `secret` in it, or else a good one.

    Then it returned a value, and `right` raises unless that is what it has to be. Anything else fails.
    """
    value, problem = None, None
    try:
        value = action()
    except Exception as error:
        problem = error
    if problem is None:
        with tried("inputs_accepted", f"{fault}, still valid") as seen:
            right(value)
            seen.append("nothing: it is still as it has to be")
    else:
        with tried("bad_inputs", fault) as seen:
            if not isinstance(problem, Fail):
                raise problem
            seen.append(str(problem))
            assert seen[0].isprintable()
            assert not [text for text in secret if text in seen[0]]


def check_section(stage: str, values: dict[str, Any]) -> None:
    """Raise unless the values are only what params.yaml says, and of the type that it says."""
    written = read_section(stage)
    assert values == written
    assert all(type(value) in {type(written[name]), float} for name, value in values.items())


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


inside = st.sampled_from([True, True, True, True, False])


def changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it, however deep, removed, renamed or replaced by anything."""
    if isinstance(value, dict) and value and draw(inside):
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
    if isinstance(value, list) and value and draw(inside):
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
    attempt("params.yaml: values", LOADERS[stage], lambda params: check_section(stage, params.model_dump()))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.usefixtures("here")
def test_whole_profiles_are_accepted(profile: dict[str, Any]):
    Path("params.yaml").write_text(json.dumps(profile))
    assert {stage: load().model_dump() for stage, load in LOADERS.items()} == profile


def load_all() -> dict[str, dict[str, Any]]:
    """Every section of params.yaml; raises the first `Fail`, but after all sections were tried."""
    loaded: dict[str, dict[str, Any]] = {}
    problems: list[Fail] = []
    for stage, load in LOADERS.items():
        try:
            loaded[stage] = load().model_dump()
        except Fail as error:
            problems.append(error)
    assert all(str(problem).isprintable() for problem in problems)
    for problem in problems:
        raise problem
    return loaded


def check_sections(loaded: dict[str, dict[str, Any]]) -> None:
    for stage, section in loaded.items():
        check_section(stage, section)


@many
@given(body=damaged(MICRO))
@pytest.mark.usefixtures("here")
def test_a_damaged_params_file(body: bytes):
    Path("params.yaml").write_bytes(body)
    attempt("params.yaml: damaged text", load_all, check_sections)


# What YAML has and JSON has not, well formed and not.
YAML = r"""
2024-13-45  2024-01-32  2024-01-01  2024-01-01T25:00:00Z  2024-01-01 1:2:99  12:61  !!timestamp x  !!int abc  !!int 0x
!!float x  !!float .  !!bool maybe  !!null x  !!str 1  !!binary ä  !!set {a, b}  !!set 3  !!omap [a, b]  !!omap 3
!!pairs 3  !!seq x  !!map [1]  !!merge x  !!python/object:os.system x  !!python/object/apply:os.system [true]
!!python/name:os.system  !unknown 3  !<tag:yaml.org,2002:int> z  .nan  .inf  -.inf  1e400  1e-400  -0  +1  0x1F  0o17
0o9  0b2  0x  1_000  1_  ._  1.  .5  - 1  =  <<  ~  null  yes  Off  TRUE  &a 1  &a [*a]  &a {b: *a}  *nowhere
[&a 1, *a]  {<<: {r: 1}}  {<<: 3}  {<<: [1]}  {? [1] : 2}  {? {a: 1} : 2}  {1: 2}  {a: 1, a: 2}  "\x00"  "\ud800"
"\U00110000"  "\q"  '  "  @x  `x  %x  [  {  ]  }  [1,  {a  - - -  ? x  : x  a: b: c  |  #  !  !!  &  *  >  >9  ---
...  %YAML 9.9
"""
YAML_VALUES = [
    *re.split("  |\n", YAML.strip()),
    "\t1",
    "9" * 5000,
    *(text * 500 for text in ("[", "{a: ", "- ", "!a ")),
]


@st.composite
def yaml_texts(draw: st.DrawFn) -> bytes:
    """The micro profile with a value or a line in it that YAML may have, and that no program would write."""
    lines = MICRO.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    key, _, old = lines[at].partition(":")
    value = draw(st.sampled_from(YAML_VALUES) | st.text("[]{}:,-?!&*|>'\"%@#~<=. \t\n019aeEx_+", max_size=12))
    match draw(st.sampled_from(["value", "value", "value", "line", "twice", "merged"])):
        case "value":
            lines[at] = f"{key}: {value}"
        case "line":
            lines.insert(at, " " * draw(st.sampled_from([0, 1, 2, 4])) + value)
        case "twice":
            lines.insert(at, f"{key}: {draw(st.sampled_from([old, value]))}")
        case _:
            lines.insert(at, f"  <<: {value}")
    return "\n".join(lines).encode()


@many
@given(body=yaml_texts())
@pytest.mark.usefixtures("here")
def test_a_params_file_with_all_that_yaml_has(body: bytes):
    Path("params.yaml").write_bytes(body)
    attempt("params.yaml: YAML of all kinds", load_all, check_sections)


@many
@given(st.data())
def test_records(data: st.DataObject):
    pmid = data.draw(st.sampled_from(sorted(RECORDS)))
    records = RECORDS | {pmid: changed(data.draw, RECORDS[pmid])}
    truth = data.draw(st.sampled_from([TRUTH, TRUTH, changed(data.draw, TRUTH)]))
    text = RECORDS[pmid]["LONG_ANSWER"]
    if not isinstance(truth, dict):
        return

    def right(_: None) -> None:
        rows = [f"chat,{pmid},yes,-1.0,-2.0,-3.0,yes,yes,5" for pmid in records]
        (table,) = parse_predictions("\n".join([",".join(COLUMNS), *rows]), "tuned.csv").values()
        assert {row.pmid for row in table} == records.keys()  # what is scored can be read back
        for record in records.values():
            json.dumps([prompt(record, "system"), completion(record)], ensure_ascii=False).encode()
            assert record["final_decision"] in LABELS
        assert 0 < len(truth) < len(records)

    attempt("records", lambda: formatting.check_records(records, truth), right, text)


@many
@given(
    body=damaged(json.dumps(RECORDS[min(RECORDS)]))
    | values.map(lambda value: json.dumps(value).encode())
    | st.just(b"[" * 100_000)
)
@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_json(read: Callable[[Path], Any], body: bytes):
    def right(value: Any) -> None:
        lines = body.decode().splitlines() if read is read_jsonl else [body]
        values = [json.loads(line) for line in lines]
        assert json.dumps(value) == json.dumps(values if read is read_jsonl else values[0])

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file.json")
        path.write_bytes(body)
        attempt("JSON and JSONL", lambda: read(path), right)


@many
@given(st.data())
def test_examples(data: st.DataObject):
    rows = [formatting.example(pmid, RECORDS[pmid], "system") for pmid in sorted(RECORDS)[:3]]
    rows[1] = changed(data.draw, rows[1])

    def right(accepted: list[dict[str, Any]]) -> None:
        assert accepted == rows
        for row in accepted:
            assert row["label"] in LABELS
            assert all(isinstance(turn["content"], str) for turn in row["prompt"] + row["completion"])
            json.dumps([row["pmid"], row["prompt"], row["completion"]], ensure_ascii=False).encode()

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "train.jsonl")
        write_jsonl(path, rows)
        attempt("examples", lambda: read_examples(path), right, RECORDS[min(RECORDS)]["LONG_ANSWER"])


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

    def right(accepted: dict[str, Any]) -> None:
        assert identity["files"] == IDENTITY["files"]
        assert accepted["peft_type"] == "LORA"
        assert type(accepted["r"]) in {int, float}
        assert type(accepted["lora_alpha"]) in {int, float}
        assert 0 < accepted["lora_alpha"] / accepted["r"] < float("inf")

    with tempfile.TemporaryDirectory() as directory:
        adapter = Path(directory, "adapter")
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "trained_on.json").write_text(json.dumps(identity))
        attempt("adapter configs", lambda: check_adapter(adapter, IDENTITY), right)


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
    def right(tables: dict[str, list[Any]]) -> None:
        assert tables
        for protocol, rows in tables.items():
            assert protocol in PROTOCOLS
            assert len({row.pmid for row in rows}) == len(rows)
            assert all({row.label, row.prediction} <= set(LABELS) for row in rows)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tuned.csv")
        path.write_bytes(body)
        attempt("predictions", lambda: read_predictions(path), right)
