"""JSON, JSONL and CSV files: errors name file and line, and never quote the text."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.records import read_examples, read_json, read_jsonl, sha256, write_csv, write_json, write_jsonl
from pipeline.core.stage import Fail

SECRET = "Does secretin help?"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f'{{\n  "a": "{SECRET}",\n  "b": \n}}', "line 4"),
        (f'{{"a": "{SECRET}"', "line 1"),
        ("", "line 1"),
        (f'"{SECRET}', "line 1"),
    ],
)
def test_malformed_json(tmp_path: Path, text: str, place: str):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(Fail) as failure:
        read_json(path)
    assert f"{path}, {place}: not valid JSON" in str(failure.value)
    assert SECRET not in str(failure.value)


def test_a_key_that_comes_twice_is_not_lost(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('{"1": {"QUESTION": "a"}, "2": {"QUESTION": "b"}, "1": {"QUESTION": "c"}}')
    with pytest.raises(Fail, match=r"x\.json: the key '1' comes more than once"):
        read_json(path)


@pytest.mark.parametrize(
    ("third", "problem"), [("{", "not valid JSON"), ("[1]", "not a JSON object"), ("", "not valid JSON")]
)
def test_malformed_jsonl(tmp_path: Path, third: str, problem: str):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": "{SECRET}"}}\n{{}}\n{third}\n{{}}\n')
    with pytest.raises(Fail) as failure:
        read_jsonl(path)
    assert f"{path}, line 3: {problem}" in str(failure.value)
    assert SECRET not in str(failure.value)


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_missing_or_not_text(tmp_path: Path, read: object):
    assert callable(read)
    path = tmp_path / "x"
    with pytest.raises(Fail, match=r"x is missing; run `dvc repro`"):
        read(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(Fail, match="x, byte 7: not valid UTF-8"):
        read(path)


def test_equal_values_are_equal_files(tmp_path: Path):
    write_json(tmp_path / "a", {"b": 1, "a": "µ"})
    write_json(tmp_path / "b", {"a": "µ", "b": 1})
    assert (tmp_path / "a").read_text() == '{\n  "a": "µ",\n  "b": 1\n}\n' == (tmp_path / "b").read_text()
    assert read_json(tmp_path / "a") == {"a": "µ", "b": 1}


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b", "a\x85b", "a\x1cb", "µg ≥ 5", '"quoted"'])
def test_a_row_stays_on_one_line(tmp_path: Path, text: str):
    rows = [{"text": text}, {"text": "next"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 2


def test_rows_that_fail_leave_the_old_file(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(ZeroDivisionError):
        write_jsonl(path, ({"a": 1 // n} for n in (1, 0)))
    assert read_jsonl(path) == [{"a": 1}]


def test_csv(tmp_path: Path):
    write_csv(tmp_path / "x.csv", ["a", "b"], [(1, "yes"), (0.5, "no")])
    assert (tmp_path / "x.csv").read_text() == "a,b\n1,yes\n0.5,no\n"


def test_sha256(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


TURN = {"role": "user", "content": SECRET}
EXAMPLE: dict[str, Any] = {"pmid": "1", "label": "yes", "prompt": [TURN], "completion": [TURN]}
ASKED = EXAMPLE | {"lm_eval": SECRET, "question_only": [TURN]}


def test_examples_are_read_as_they_were_written(tmp_path: Path):
    for rows, test in (([EXAMPLE, EXAMPLE], False), ([ASKED, ASKED], True), ([ASKED], False)):
        write_jsonl(tmp_path / "x.jsonl", rows)
        assert read_examples(tmp_path / "x.jsonl", test) == rows


@pytest.mark.parametrize(
    "changes",
    [
        {"pmid": 1},
        {"label": "unparsable"},
        {"prompt": []},
        {"prompt": TURN},
        {"prompt": [SECRET]},
        {"prompt": [{"role": "user"}]},
        {"prompt": [TURN | {"name": "x"}]},
        {"prompt": [TURN | {"content": None}]},
        {"completion": []},
        {"completion": [TURN | {"role": "\ud800"}]},
        {"lm_eval": None},
        {"lm_eval": [TURN]},
        {"question_only": []},
        {"question_only": SECRET},
    ],
)
def test_what_is_no_example_is_named_by_its_line(tmp_path: Path, changes: dict[str, Any]):
    write_jsonl(tmp_path / "x.jsonl", [ASKED, ASKED | changes])
    with pytest.raises(Fail, match=r"x\.jsonl, line 2: not an example as `format` writes it") as failure:
        read_examples(tmp_path / "x.jsonl", test=True)
    assert SECRET not in str(failure.value)


def test_no_example_at_all(tmp_path: Path):
    write_jsonl(tmp_path / "x.jsonl", [])
    with pytest.raises(Fail, match=r"x\.jsonl holds no example"):
        read_examples(tmp_path / "x.jsonl")
