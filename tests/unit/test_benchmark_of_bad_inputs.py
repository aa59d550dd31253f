"""benchmarks/bad_inputs.py counts a refusal as clean only if it is."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import bad_inputs
from benchmarks.bad_inputs import Case, run


def refuse() -> None:
    sys.exit("base: params.yaml has no section 'base'; compare it")


def leave_a_file() -> None:
    Path("half").write_text("")
    refuse()


def change_a_file() -> None:
    Path("params.yaml").write_text("longer")
    refuse()


def fail() -> None:
    raise ValueError("x")


ENDS: dict[str, tuple[Callable[[], None], int | None, list[str]]] = {
    "refused": (refuse, 1, []),
    "accepted": (lambda: None, 0, ["exit status 0", "no sentence"]),
    "traceback": (fail, 1, ["traceback", "no sentence"]),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, ["exit status -9", "no sentence"]),
    "word": (lambda: sys.exit("base: no"), 1, ["no sentence"]),
    "other command": (lambda: sys.exit("train: params.yaml has no section 'base'"), 1, ["no sentence"]),
    "other reason": (lambda: sys.exit("base: models/base is missing; run it"), 1, ["not about params.yaml"]),
    "new file": (leave_a_file, 1, ["project/half"]),
    "changed file": (change_a_file, 1, ["project/params.yaml"]),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_is_unclean_about_a_refusal_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str):
    action, expected, words = ENDS[end]
    monkeypatch.setattr(bad_inputs, "start", lambda *_: action())
    (tmp_path / "run" / "project").mkdir(parents=True)
    case = Case("", "", ["base"], {"project/params.yaml": b"base"}, True, "params.yaml")
    status, problem = run(case, tmp_path / "run")
    assert status == expected
    assert ([word for word in words if word not in problem], bool(problem)) == ([], bool(words)), problem
