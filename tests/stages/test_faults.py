"""Killed at seeded moments, a run ends as one that was not; `make` runs the whole of it: benchmarks/faults.py."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import Kill, finish, forget, kill_all, left_over, measure, plan, results, strike, take_way_out
from tests.conftest import ROOT, repro, run_command, set_params, stages, tried

CHEAP = ("download", "format", "merge", "evaluate", "report")
MEASURED = {"evaluate": {"seconds": 1.0, "write": 20.0}}


@pytest.fixture
def reproduced(project: Path) -> Path:
    """A finished project that DVC takes for its own work."""
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    committed = run_command(project, "python3 -m dvc commit --force")
    assert committed.returncode == 0, committed.stderr
    return project


def test_fifteen_kills_in_cheap_stages_and_in_dvc(reproduced: Path, tmp_path: Path):
    expected = results(reproduced)
    copy = Path(shutil.copytree(reproduced, tmp_path / "measured" / "project"))
    for project in (copy, reproduced):
        forget(project, *CHEAP)
    measured = measure(copy)
    assert measured.keys() == set(CHEAP)
    rows = list(kill_all(reproduced, plan(15, 1, CHEAP), measured, expected))
    assert [(row["differ"], row["outlived"]) for row in rows] == [([], [])] * 15
    assert all(row["survived"] for row in rows)
    assert {row["stage"] for row in rows} == set(CHEAP)
    for name, values in (("whom", faults.VICTIMS), ("point", faults.POINTS), ("shell", faults.SHELLS)):
        assert {row[name] for row in rows} == set(values)
    assert [row["struck"][:13] for row in rows if row["point"] == "dvc.lock"] == ["open dvc.lock"] * 2


def test_the_plan_covers_every_stage_and_two_thirds_of_it_aim_at_writes():
    assert set(faults.STAGES) == set(stages(ROOT))
    kills = plan(90, 7)
    assert plan(90, 7) == kills != plan(90, 8)
    assert {kill.stage: sum(other.stage == kill.stage for other in kills) for kill in kills} == dict.fromkeys(
        faults.STAGES, 9
    )
    points = [kill.point for kill in kills]
    assert [points.count(point) for point in ("time", "write", "dvc.lock", "dvc")] == [30, 30, 15, 15]
    assert all(kill.whom == "dvc" for kill in kills if kill.point in ("dvc.lock", "dvc"))
    assert {(kill.stage, kill.point) for kill in kills} == {(s, p) for s in faults.STAGES for p in faults.POINTS}


def test_what_is_left_over_or_altered_counts_as_lost(project: Path, monkeypatch: pytest.MonkeyPatch):
    expected = results(project)
    assert left_over(project) == []
    monkeypatch.setattr(faults, "finish", lambda project: [])
    monkeypatch.setattr(faults, "strike", lambda *arguments: {"struck": "open it", "outlived": [], "left": []})
    (project / "metrics" / "train.json").write_text("{}")
    (project / "models" / ".left.partial").touch()
    (project / "pipeline" / ".left.partial").mkdir()
    (project / ".checkpoints").mkdir()
    (project / ".checkpoints" / "key.jsonl").touch()
    for path in ("tmp/torchinductor_root/left", "tmp/left", "home/.cache/left"):
        (project.parent / path).mkdir(parents=True)
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    [row] = kill_all(project, [Kill("train", "dvc", "time", 0.5)], {"train": {}}, expected)
    assert not row["survived"]
    assert row["differ"] == [
        "metrics/train.json",
        "models/.left.partial",
        "home/.cache",
        "home/.cache/left",
        "project/.checkpoints/key.jsonl",
        "project/models/.left.partial",
        "project/pipeline/.left.partial",
        "tmp/left",
        "tmp/torchinductor_root/left",
    ]


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh", ""], ids=["bash", "sh", "no SHELL"])
def test_a_stage_dies_with_dvc(reproduced: Path, shell: str):
    forget(reproduced, "evaluate")
    found = strike(reproduced, Kill("evaluate", "dvc", "time", 0.5, shell=shell), MEASURED, [])
    assert found == {"struck": "0.50 seconds after its start", "outlived": [], "left": []}


def test_what_outlives_a_kill_is_found_and_ended(reproduced: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "GONE", 0.5)
    described = (reproduced / "dvc.yaml").read_text()
    (reproduced / "dvc.yaml").write_text(
        described.replace(
            "exec python3 -m pipeline.stages.evaluate", "sleep 99 & exec python3 -m pipeline.stages.evaluate"
        )
    )
    [row] = kill_all(reproduced, [Kill("evaluate", "dvc", "time", 0.5)], MEASURED, results(reproduced))
    assert row["outlived"] == ["sleep 99"]
    assert not row["survived"]


def test_a_failure_that_no_kill_explains_is_not_taken_for_one(reproduced: Path):
    set_params(reproduced, "evaluate", n_ctx=-1)
    for whom in faults.VICTIMS:
        with pytest.raises(RuntimeError, match=r"no kill was why: (?s:.*)evaluate\.n_ctx"):
            strike(reproduced, Kill("evaluate", whom, "write", 0.99), MEASURED, [])
    with pytest.raises(RuntimeError, match="no kill was why"):
        finish(reproduced)


@pytest.mark.parametrize("content", ["reused", "truncated"])
def test_a_stale_lock_of_dvc_and_the_way_out(reproduced: Path, content: str):
    forget(reproduced, "report")
    stale = {"write": {str(reproduced / "models" / "release"): {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}}
    text = json.dumps(stale) if content == "reused" else json.dumps(stale)[:20]
    (reproduced / ".dvc" / "tmp" / "rwlock").write_text(text)
    with tried("locks", f"DVC's rwlock, {'of a process id in use again' if content == 'reused' else 'cut'}") as seen:
        result = run_command(reproduced, "python3 -m dvc repro")
        assert result.returncode != 0
        seen.append(take_way_out(reproduced, result.stderr))
        assert seen[0].endswith("(`rm -f .dvc/tmp/rwlock`)")
        assert ("is busy, it is being blocked by" if content == "reused" else "RWLock-file") in seen[0]
        assert finish(reproduced) == []


@pytest.mark.parametrize(
    "end",
    ["", pytest.param("hash: ", marks=pytest.mark.slow), "hash: md"],
    ids=["to nothing", "before a word", "within a word"],
)
def test_a_dvc_lock_that_a_kill_left_cut_and_the_way_out(reproduced: Path, end: str, request: pytest.FixtureRequest):
    expected = results(reproduced)
    forget(reproduced, "report")
    assert repro(reproduced, "--no-run-cache") == ["report"]  # a stage keeps a copy when it begins
    lock = reproduced / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: whole.rindex(end) + len(end)] if end else "")
    with tried("locks", f"dvc.lock, cut {request.node.callspec.id}, as when DVC is killed while it writes it") as seen:
        result = run_command(reproduced, "python3 -m dvc repro")
        assert result.returncode != 0
        seen.append(take_way_out(reproduced, result.stderr))
        assert seen[0].endswith("(`cp .dvc/tmp/dvc.lock dvc.lock`)")
        assert repro(reproduced, "--no-run-cache") == ["report"]
        assert results(reproduced) == expected
    assert lock.read_text() == whole


def test_a_lock_of_git_that_dvc_left_and_the_way_out(reproduced: Path):
    forget(reproduced, "report")
    (reproduced / ".git" / "index.lock").touch()
    with tried("locks", "git's index.lock, as when DVC is killed while it adds dvc.lock") as seen:
        result = run_command(reproduced, "python3 -m dvc repro")
        assert result.returncode != 0
        seen.append(take_way_out(reproduced, result.stderr))
        assert finish(reproduced) == []


def test_troubleshooting_has_the_ways_out():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert not [command for command in faults.WAYS_OUT.values() if f"`{command}`" not in text]
