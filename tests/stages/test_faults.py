"""Killed at seeded moments, a run ends as one that was not; `make` runs the whole of it: benchmarks/faults.py."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import Kill, finish, forget, kill_all, measure, plan, results, strike
from tests.conftest import ROOT, run_command, stages

CHEAP = ("download", "format", "merge", "evaluate", "report")


@pytest.fixture
def reproduced(project: Path) -> Path:
    """A finished project that DVC takes for its own work."""
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    committed = run_command(project, "python3 -m dvc commit --force")
    assert committed.returncode == 0, committed.stderr
    return project


def test_twelve_kills_in_cheap_stages(reproduced: Path, tmp_path: Path):
    expected = results(reproduced)
    changes, seconds = measure(Path(shutil.copytree(reproduced, tmp_path / "measured")), CHEAP)
    forget(reproduced, *CHEAP)
    kills = sorted(plan(12, 1, CHEAP), key=lambda kill: CHEAP.index(kill.stage))
    rows = list(kill_all(reproduced, kills, changes, seconds, expected))
    assert {row["whom"] for row in rows} == set(faults.VICTIMS)
    assert {row["stage"] for row in rows} == set(CHEAP)
    assert [row["differ"] for row in rows] == [[]] * 12


def test_the_plan_covers_every_stage_and_half_of_it_aims_at_writes():
    assert set(faults.STAGES) == set(stages(ROOT))
    number = 8 * len(faults.STAGES)
    kills = plan(number, 7)
    assert plan(number, 7) == kills != plan(number, 8)
    assert {kill.stage: sum(other.stage == kill.stage for other in kills) for kill in kills} == dict.fromkeys(
        faults.STAGES, 8
    )
    assert sum(kill.point == "write" for kill in kills) == number / 2


def test_what_is_left_over_or_altered_counts_as_lost(project: Path, monkeypatch: pytest.MonkeyPatch):
    expected = results(project)
    monkeypatch.setattr(faults, "finish", lambda project: [])
    (project / "models" / ".left.partial").touch()
    (project / "metrics" / "train.json").write_text("{}")
    monkeypatch.setattr(faults, "strike", lambda *arguments: True)
    [row] = kill_all(project, [Kill("train", "dvc", "time", 0.5)], {}, {}, expected)
    assert not row["survived"]
    assert row["differ"] == ["metrics/train.json", "models/.left.partial"]


def test_a_stage_dies_with_dvc(reproduced: Path):
    forget(reproduced, "evaluate")
    assert strike(reproduced, Kill("evaluate", "dvc", "time", 0.5), {}, {"evaluate": 1.0})  # raises if it lives on


@pytest.mark.parametrize("content", ["reused", "truncated"])
def test_a_stale_lock_of_dvc_and_the_way_out(reproduced: Path, content: str):
    forget(reproduced, "report")
    stale = {str(reproduced / "models" / "release"): {"write": {"pid": os.getpid(), "cmd": "dvc repro"}}}
    text = json.dumps(stale) if content == "reused" else json.dumps(stale)[:20]
    (reproduced / ".dvc" / "tmp" / "rwlock").write_text(text)
    result = run_command(reproduced, "python3 -m dvc repro")
    assert result.returncode != 0
    assert "rwlock" in result.stderr
    way_out = "rm -f .dvc/tmp/rwlock"
    assert way_out in (ROOT / "README.md").read_text(encoding="utf-8")
    assert run_command(reproduced, way_out).returncode == 0
    assert finish(reproduced) == []
