"""The journal of a run of questions: a killed run loses none of them, and another run gets none of its rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.records import CHECKPOINTS
from pipeline.scoring.predict import Params, journal

PARAMS = Params(protocols=["chat"], n_ctx=64, max_new_tokens=1)
ROWS: list[list[Any]] = [
    ["chat", "1", "yes", "-0.100000", "-3.000000", "-4.000000", "yes", "yes", 7],
    ["chat", "2-µ", "no", "-0.200000", "-3.000000", "-4.000000", "yes", "unparsable", 8],
    ["chat", "3", "no", "-3.000000", "-1.000000", "-4.000000", "no", "no", 7],
]
ASKED = [(str(row[0]), {"pmid": row[1], "label": row[2]}) for row in ROWS]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files to ask from, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("N_GPU_LAYERS", raising=False)
    for name in ("model.gguf", "test.jsonl"):
        Path(name).write_text(name)
    return [Path("model.gguf"), Path("test.jsonl")]


def killed(inputs: list[Path], rows: list[list[Any]]) -> None:
    """A run that ends after these rows."""
    with pytest.raises(KeyboardInterrupt), journal(PARAMS, inputs, ASKED) as (_, keep):  # noqa: PT012  # half way
        for row in rows:
            keep(row)
        raise KeyboardInterrupt


def written() -> list[Path]:
    return sorted(CHECKPOINTS.iterdir()) if CHECKPOINTS.exists() else []


def test_a_row_is_on_the_disk_as_soon_as_it_is_kept(inputs: list[Path]):
    with journal(PARAMS, inputs, ASKED) as (rows, keep):
        for number, row in enumerate(ROWS, 1):
            keep(row)
            assert rows == ROWS[:number]
            (path,) = written()
            assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert written() == []


ZEROS = "\0" * 60 + "\n"  # what a lost machine's disk can hold where it had not written yet
OTHER = json.dumps(ROWS[1]) + "\n"  # a question that was asked already


@pytest.mark.parametrize(
    "cut", ["", '["chat", "3"', '["chat", "µ', "[", json.dumps(ROWS[2]), ZEROS, OTHER, "[]\n", "7\n"]
)
def test_the_next_run_goes_on_after_the_last_whole_row(inputs: list[Path], cut: str):
    killed(inputs, ROWS[:2])
    assert len(written()) == 1
    (path,) = written()
    with path.open("a", encoding="utf-8") as file:
        file.write(cut)
    killed(inputs, [])  # killed before it had another row
    assert path.read_text(encoding="utf-8").count("\n") == 2
    with journal(PARAMS, inputs, ASKED) as (rows, keep):
        assert rows == ROWS[:2]
        keep(ROWS[2])
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == ROWS
    assert rows == ROWS
    assert not CHECKPOINTS.exists()


def test_another_model_other_questions_parameters_or_layers_begin_anew(
    inputs: list[Path], monkeypatch: pytest.MonkeyPatch
):
    killed(inputs, ROWS[:1])

    def begun(params: Params = PARAMS) -> list[list[Any]]:
        with journal(params, inputs, ASKED) as (rows, _):
            return rows

    assert begun(PARAMS.model_copy(update={"n_ctx": 65})) == []
    with monkeypatch.context() as patch:
        patch.setenv("N_GPU_LAYERS", "3")
        assert begun() == []
    for path in inputs:
        text = path.read_text()
        path.write_text(f"{text} altered")
        assert begun() == []
        path.write_text(text)
    assert begun() == ROWS[:1]


def test_the_journal_goes_only_when_what_follows_the_questions_is_done(inputs: list[Path]):
    with pytest.raises(OSError, match="full"), journal(PARAMS, inputs, ASKED) as (_, keep):  # noqa: PT012
        for row in ROWS:
            keep(row)
        raise OSError("the disk is full")
    with journal(PARAMS, inputs, ASKED) as (rows, _):
        assert rows == ROWS
    assert not CHECKPOINTS.exists()


def test_a_run_without_a_row_leaves_nothing_of_its_own_behind(inputs: list[Path]):
    killed(inputs, [])
    assert not CHECKPOINTS.exists()
    (CHECKPOINTS / "of-train").mkdir(parents=True)
    killed(inputs, [])
    assert written() == [CHECKPOINTS / "of-train"]
