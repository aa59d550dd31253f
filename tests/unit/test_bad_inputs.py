"""Anything at all in a file that a person may edit: one sentence, or a value that is what it has to be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.dataset import Dataset, read_dataset
from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.core.labels import LABELS
from pipeline.core.params import load_params, read_section
from pipeline.core.record import Record
from pipeline.models.manifest import read_manifest
from pipeline.scoring.predictions import COLUMNS, read_predictions
from pipeline.scoring.protocols import PROTOCOLS, answer, as_question
from pipeline.simulated.trials import records as trials
from pipeline.stages.merge import check_adapter
from tests.conftest import yaml
from tests.unit.test_params import PROFILES, SECTIONS

many = settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))

MICRO = PROFILES["micro"].read_text()
SECTIONS_OF_PROFILES = [yaml.load(path.read_text()) for path in PROFILES.values()]
RECORDS, TRUTH = trials(1, 20, 20)
SECRET = str(RECORDS[min(RECORDS)]["LONG_ANSWER"])

texts = st.text(max_size=8) | st.sampled_from(["", " ", "yes", "\ud800", "\u2028", "<|eot_id|>", "1e-4", "../x", "nan"])
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([0, -1, 10**400, 2**63, 1e308])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def attempt(action: Callable[[], Any], right: Callable[[Any], None]) -> None:
    """Run `action`: it has to raise one clean sentence without SECRET, or to return a value that `right` accepts."""
    try:
        value = action()
    except Fail as error:
        said = str(error)
    else:
        return right(value)
    assert said.isprintable()
    assert SECRET not in said


@st.composite
def damaged(draw: st.DrawFn, whole: str) -> bytes:
    """A text with a piece cut out, replaced or doubled."""
    body = whole.encode()
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + draw(st.sampled_from([0, 1, 3, 40, len(body)])))))
    other = st.binary(max_size=6) | texts.map(lambda text: text.encode(errors="surrogatepass"))
    return body[:start] + draw(other | st.just(body[start:end] * 2)) + body[end:]


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


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def attempt_section(section: str) -> None:
    """Its values have to be those of params.yaml and no others, and of the types that are written there."""

    def right(found: dict[str, Any]) -> None:
        written = read_section(section)
        assert found == written
        assert all(type(value) in {type(written[name]), float} for name, value in found.items())

    attempt(lambda: load_params(section, SECTIONS[section]).model_dump(), right)


@many
@given(st.data())
@pytest.mark.parametrize("section", SECTIONS)
def test_parameters(section: str, data: st.DataObject):
    found = changed(data.draw, data.draw(st.sampled_from(SECTIONS_OF_PROFILES))[section])
    Path("params.yaml").write_text(json.dumps({section: found}, allow_nan=True), errors="replace")
    attempt_section(section)


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
DEEP = [text * 500 for text in ("[", "{a: ", "- ", "!a ")]
YAML_VALUES = [*re.split("  |\n", YAML.strip()), "\t1", "9" * 5000, *DEEP]


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
@given(body=damaged(MICRO) | yaml_texts())
def test_a_params_file(body: bytes):
    Path("params.yaml").write_bytes(body)
    for section in SECTIONS:
        attempt_section(section)


@many
@given(st.data())
def test_records(data: st.DataObject):
    pmid = data.draw(st.sampled_from(sorted(RECORDS)))
    found = RECORDS | {pmid: changed(data.draw, RECORDS[pmid])}
    truth = data.draw(st.sampled_from([TRUTH, TRUTH, changed(data.draw, TRUTH)]))
    for name, value in (("records", found), ("truth", truth)):
        Path(name).write_text(json.dumps(value))

    def right(dataset: Dataset) -> None:
        assert 0 < len(dataset.test) < len(dataset.records)
        for name, record in dataset.records.items():  # what becomes of it can be written
            json.dumps([as_question(name, record, "system").model_dump(), answer(record)], ensure_ascii=False).encode()

    attempt(lambda: read_dataset(Path("records"), Path("truth"), "records", "truth"), right)


EXAMPLE = {"pmid": "1", "label": "yes", "text": SECRET, "input_ids": [1, 2, 3], "prompt_tokens": 2}
QUESTION = as_question("1", Record.model_validate(RECORDS[min(RECORDS)]), "system")


@many
@given(st.data())
@pytest.mark.parametrize("row", [Example.model_validate(EXAMPLE), QUESTION], ids=["examples", "questions"])
def test_rows(row: Any, data: st.DataObject):
    rows = [row.model_dump(), changed(data.draw, row.model_dump())]
    Path("x.jsonl").write_text("".join(json.dumps(value) + "\n" for value in rows))

    def right(accepted: list[Any]) -> None:
        assert [value.model_dump() for value in accepted] == rows

    attempt(lambda: read_rows(Path("x.jsonl"), type(row)), right)


FILES = [{"name": "model.safetensors", "size": 3, "sha256": "0" * 64}]
MANIFEST = {"source": "tiny", "repo_id": "", "revision": "", "path": "", "files": FILES}
CONFIG = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "rank_pattern": {}, "bias": "none", "fan_in_fan_out": False}
IDENTITY = {"adapter": "0" * 64, "files": FILES}


@many
@given(st.data())
def test_adapters_and_manifests(data: st.DataObject):
    altered = data.draw(st.integers(0, 2))
    for i, (name, value) in enumerate({"adapter_config": CONFIG, "trained_on": IDENTITY, "manifest": MANIFEST}.items()):
        Path(f"{name}.json").write_text(json.dumps(changed(data.draw, value) if i == altered else value))

    def right(config: dict[str, Any]) -> None:
        found = [json.loads(Path(f"{name}.json").read_text())["files"] for name in ("trained_on", "manifest")]
        assert found == [FILES, FILES]
        assert 0 < config["lora_alpha"] / config["r"] < float("inf")

    attempt(lambda: check_adapter(Path(), read_manifest(Path())), right)


TABLE = [
    f"{name},{pmid},{label},-1.0,-2.0,-3.0,yes,,5"
    for name in PROTOCOLS
    for pmid, label in zip("789", LABELS, strict=True)
]


@many
@given(body=damaged("\n".join([",".join(COLUMNS), *TABLE, ""])))
def test_predictions(body: bytes):
    Path("tuned.csv").write_bytes(body)

    def right(tables: dict[Any, list[Any]]) -> None:
        for protocol, rows in tables.items():
            assert (protocol in PROTOCOLS, len({row.pmid for row in rows})) == (True, len(rows))
            assert all({row.label, row.prediction} <= set(LABELS) for row in rows)

    attempt(lambda: read_predictions(Path("tuned.csv")), right)
