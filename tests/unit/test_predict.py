"""The journal of a run of questions: a killed run loses none of them, and another run gets none of its rows."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.question import Question
from pipeline.core.resume import CHECKPOINTS, run_key
from pipeline.scoring.journal import journal, whole_rows
from pipeline.scoring.predict import EXTRAS, Settings, as_line, parse_line
from pipeline.scoring.predictions import Prediction
from tests.conftest import ROOT

SETTINGS = Settings("evaluate", ["chat"], 64, 1, "f16")
ROWS = [
    Prediction("chat", "1", "yes", (-0.1, -3.0, -4.0), "yes", "yes", 7),
    Prediction("chat", "2-µ", "no", (-0.2, -3.0, -4.0), "yes", "unparsable", 8),
    Prediction("chat", "3", "no", (-3.0, -1.0, -4.0), "no", "no", 7),
]
ASKED = [
    (row.protocol, Question(pmid=row.pmid, label=row.label, system_prompt="", question="?", contexts=[], labels=[]))
    for row in ROWS
]
LINES = [json.dumps(row.row()).encode() + b"\n" for row in ROWS]
INPUTS = [Path("model.gguf"), Path("test.jsonl")]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("N_GPU_LAYERS", raising=False)
    Path("pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    for path in INPUTS:
        path.write_text(path.name)


def opened(settings: Settings = SETTINGS) -> Any:
    """The journal as `predict` opens it."""
    key = run_key(settings._asdict(), INPUTS, EXTRAS, os.environ.get("N_GPU_LAYERS", ""))
    return journal(key, ASKED, parse_line, as_line)


def run(rows: list[Prediction], error: type[BaseException] = KeyboardInterrupt) -> list[Prediction]:
    """A run that ends after these rows with an error; the rows that it began with."""
    with pytest.raises(error), opened() as (found, keep):  # noqa: PT012  # half way
        began = found.copy()
        for row in rows:
            keep(row)
        raise error
    return began


def whole_run(settings: Settings = SETTINGS) -> list[Prediction]:
    with opened(settings) as (rows, _):
        return rows.copy()


def test_a_row_is_on_the_disk_as_soon_as_it_is_kept():
    with opened() as (_, keep):
        for number, row in enumerate(ROWS, 1):
            keep(row)
            assert next(CHECKPOINTS.iterdir()).read_bytes() == b"".join(LINES[:number])
    assert not CHECKPOINTS.exists()


@pytest.mark.parametrize(
    "cut",
    [
        *(b"", b'["chat", "3"', b'["chat", "\xc2', b"[", b"[]\n", b"7\n", b'"chat"\n', b"{}\n", LINES[2][:-1]),
        b"\0" * 60 + b"\n",  # what the disk of a machine that crashed can hold
        LINES[1],  # the answer to another question
        LINES[2].replace(b'"no"', b'"yes"', 1),  # another label than the question's
        LINES[2].replace(b"chat", b"lm_eval"),
    ],
)
def test_whole_rows_are_those_before_the_first_that_is_cut_or_answers_another_question(cut: bytes):
    assert whole_rows(LINES[0] + LINES[1] + cut, ASKED, parse_line) == (ROWS[:2], len(LINES[0] + LINES[1]))


def test_the_next_run_goes_on_after_the_last_whole_row():
    run(ROWS[:2])
    assert CHECKPOINTS.is_dir()
    [path] = CHECKPOINTS.iterdir()
    path.write_bytes(path.read_bytes() + LINES[2][:-9])
    assert run(ROWS[2:]) == ROWS[:2]
    assert path.read_bytes() == b"".join(LINES)


def test_the_journal_goes_only_when_what_follows_the_questions_is_done():
    run(ROWS, OSError)
    assert whole_run() == ROWS
    assert not CHECKPOINTS.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda monkeypatch: INPUTS[0].write_text("another model"),
        lambda monkeypatch: INPUTS[1].write_text("other questions"),
        lambda monkeypatch: monkeypatch.setenv("N_GPU_LAYERS", "3"),
        lambda monkeypatch: SETTINGS._replace(n_ctx=65),
    ],
    ids=["model", "questions", "layers on the card", "parameters"],
)
def test_a_run_with_other_inputs_starts_over(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], Any]
):
    run(ROWS[:1])
    changed = change(monkeypatch)
    assert whole_run(changed if isinstance(changed, Settings) else SETTINGS) == []


def test_a_run_without_a_row_leaves_nothing_of_its_own_behind():
    (CHECKPOINTS / "of-train").mkdir(parents=True)
    run([])
    assert [path.name for path in CHECKPOINTS.iterdir()] == ["of-train"]
