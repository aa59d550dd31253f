"""Files are read strictly, with errors that name file and line and never quote a text; outputs appear whole or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from pipeline.core.errors import Fail
from pipeline.core.files import read_rows, sha256
from pipeline.core.json_files import read_json, read_json_object
from pipeline.core.outputs import scratch, write_csv, write_json, writing
from pipeline.core.rows import write_rows

SECRET = "Does secretin help?"


class Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    text: str
    number: int = 0


def problem(read: Callable[..., Any], path: Path, *arguments: Any) -> str:
    with pytest.raises(Fail) as failure:
        read(path, *arguments)
    assert str(failure.value).startswith(str(path))
    assert SECRET not in str(failure.value)
    return str(failure.value)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", "line 1"),
        (f'{{\n  "a": "{SECRET}",\n  "b": \n}}'.encode(), "line 4"),
        (f'"{SECRET}'.encode(), "line 1"),
        (b'{"a": "\xff"}', "byte 7"),
        (b'[{"a": {"x": 1, "y": 2, "x": 3, "y": 4}}]', "duplicate keys 'x', 'y'"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
    ],
    ids=["empty", "line", "text", "no UTF-8", "duplicates", "depth", "digits"],
)
def test_malformed_json_is_named_by_its_place(tmp_path: Path, body: bytes, place: str):
    (tmp_path / "x.json").write_bytes(body)
    assert place in problem(read_json, tmp_path / "x.json")


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path: Path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc2\xb5"}')
    assert read_json(tmp_path / "x.json") == {"a": "µ"}


def test_a_file_is_called_by_the_users_own_name_for_it(tmp_path: Path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(Fail, match=r"^theirs\.json must hold a JSON object"):
        read_json_object(tmp_path / "x.json", "theirs.json")


def test_a_missing_file_is_named(tmp_path: Path):
    assert "is missing" in problem(read_json, tmp_path / "x") + problem(read_rows, tmp_path / "x", Row)


@pytest.mark.parametrize(
    ("third", "place"), [("{", ""), ("[1]", ""), ("", ""), ('{"text": 1}', "text: "), ('{"text": "a", "b": 1}', "b: ")]
)
def test_a_row_that_is_not_what_it_should_be_is_named_by_line_and_field(tmp_path: Path, third: str, place: str):
    row = f'{{"text": "{SECRET}"}}'
    (tmp_path / "x.jsonl").write_text(f"{row}\n{row}\n{third}\n{row}\n")
    assert f", line 3: {place}" in problem(read_rows, tmp_path / "x.jsonl", Row)


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\u2028b", "a\x85b", "a\x1cb", "µg ≥ 5", '"quoted"'])
def test_a_row_stays_on_one_line_and_is_read_as_it_was_written(tmp_path: Path, text: str):
    rows = [Row(text=text), Row(text="next", number=1)]
    write_rows(tmp_path / "x.jsonl", rows)
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 2
    assert read_rows(tmp_path / "x.jsonl", Row) == rows


def test_equal_values_give_equal_files(tmp_path: Path):
    write_json(tmp_path / "a", {"b": 1, "a": "µ"})
    write_json(tmp_path / "b", {"a": "µ", "b": 1})
    assert (tmp_path / "a").read_text() == '{\n  "a": "µ",\n  "b": 1\n}\n' == (tmp_path / "b").read_text()


def test_a_csv_file_quotes_what_needs_it(tmp_path: Path):
    write_csv(tmp_path / "x.csv", ["a", "b"], [(1, "yes"), (0.5, 'a,"b"')])
    assert (tmp_path / "x.csv").read_bytes() == b'a,b\n1,yes\n0.5,"a,""b"""\n'


def test_sha256(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def fill(path: Path, text: str, directory: bool) -> None:
    if directory:
        path.mkdir()
        path /= "part"
    path.write_text(text)


def content(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
class TestWriting:
    def test_success_replaces_the_output_and_leaves_nothing_else(self, tmp_path: Path, directory: bool):
        target = tmp_path / "quite" / "new" / "output"
        for text in ("first", "second"):
            with writing(target) as partial:
                fill(partial, text, directory)
                assert not target.exists() or content(target) == "first"
            assert content(target) == text
            assert list(target.parent.iterdir()) == [target]

    @pytest.mark.parametrize("written", [True, False], ids=["half", "nothing"])
    def test_failure_leaves_the_old_output_and_nothing_else(self, tmp_path: Path, directory: bool, written: bool):
        target = tmp_path / "output"
        fill(target, "old", directory)
        with pytest.raises((ZeroDivisionError, FileNotFoundError)), writing(target) as partial:  # noqa: PT012
            if written:
                fill(partial, "half", directory)
                raise ZeroDivisionError
        assert content(target) == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_what_a_killed_run_left_is_removed_first(self, tmp_path: Path, directory: bool):
        with scratch(tmp_path / "output") as name:
            pass
        fill(name, "left over", not directory)
        with writing(tmp_path / "output") as partial:
            assert (partial, partial.exists()) == (name, False)
            fill(partial, "new", directory)
        assert list(tmp_path.iterdir()) == [tmp_path / "output"]


def test_scratch_never_becomes_an_output(tmp_path: Path):
    with scratch(tmp_path / "wide.gguf") as partial:
        partial.write_text("temporary")
        assert (partial.name[0], partial.suffix) == (".", ".partial")  # what .gitignore names
    assert list(tmp_path.iterdir()) == []
