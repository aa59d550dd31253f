"""A run that is killed ends, when run again, as one that was not; every lock that a kill leaves has a way out."""

import json
import os
import shutil
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import finish, forget, results, take_way_out
from tests.conftest import ROOT, repro, run_command, stages

CHEAP = ("download", "format", "merge", "evaluate", "report")


@pytest.mark.slow
def test_after_fifteen_kills_of_stages_and_of_dvc_the_next_run_ends_the_same(project: Path, tmp_path: Path) -> None:
    expected = results(project)
    copy = Path(shutil.copytree(project, tmp_path / "measured" / "project", symlinks=True))
    for path in (copy, project):
        forget(path, *CHEAP)
    rows = list(faults.kill_all(project, faults.plan(15, 1, CHEAP), faults.measure(copy), expected))
    assert [(row["differ"], row["outlived"]) for row in rows] == [([], [])] * 15
    assert {row["stage"] for row in rows} == set(CHEAP)
    for name, values in (("whom", faults.VICTIMS), ("point", faults.POINTS), ("shell", faults.SHELLS)):
        assert {row[name] for row in rows} == set(values)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["0", "0.5"])
@pytest.mark.parametrize("stage", stages(ROOT))
def test_ctrl_c_in_any_stage_ends_in_one_line(project: Path, stage: str, after: str) -> None:
    """A terminal sends it to the stage and to all that the stage started: at its first write, or a little later."""
    where = {"KILL_STAGE": stage, "KILL_POINT": "write", "KILL_AT": "1", "KILL_AFTER": after}
    strike = {"KILL_WHOM": "group", "KILL_SIGNAL": "INT", "PYTHONPATH": str(ROOT / "benchmarks/kill")}
    command = stages(project)[stage]["cmd"].removeprefix("exec ")
    unignored = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    done = run_command(project, f"setsid --wait python3 -c '{unignored}' {command}", **where, **strike)
    if after == "0" or done.returncode:  # a quick stage is over before
        assert done.stderr.splitlines()[-1:] == [f"{stage}: interrupted; run `dvc repro` to continue"]
        assert "Traceback" not in done.stderr
        assert done.returncode == 1


def way_out(project: Path) -> str:
    """What a failing `dvc repro` said and the documented remedy, which was applied."""
    done = run_command(project, "python3 -m dvc repro")
    assert done.returncode != 0
    return take_way_out(project, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["reused", "truncated"])
def test_a_lock_file_of_a_killed_dvc_can_be_removed(project: Path, content: str) -> None:
    forget(project, "report")
    stale = {"write": {str(project / "models" / "release"): {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}}
    text = json.dumps(stale)
    (project / ".dvc" / "tmp" / "rwlock").write_text(text if content == "reused" else text[:20])
    assert "rm -f .dvc/tmp/rwlock" in way_out(project)
    assert finish(project) == []


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "hash: md"], ids=["to nothing", "within a word"])
def test_a_truncated_dvc_lock_is_restored_from_the_copy_that_a_stage_keeps(project: Path, end: str) -> None:
    expected = results(project)
    forget(project, "report")
    assert repro(project, "--no-run-cache") == ["report"]
    lock = project / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: whole.rindex(end) + len(end)] if end else "")
    assert "cp .dvc/tmp/dvc.lock dvc.lock" in way_out(project)
    assert repro(project, "--no-run-cache") == ["report"]
    assert results(project) == expected
    assert lock.read_text() == whole


@pytest.mark.slow
def test_a_lock_of_git_that_a_killed_dvc_left_can_be_removed(project: Path) -> None:
    forget(project, "report")
    (project / ".git" / "index.lock").touch()
    assert "find .git -name '*.lock' -delete" in way_out(project)
    assert finish(project) == []


def test_the_documentation_has_the_ways_out() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert [command for command in faults.WAYS_OUT.values() if f"`{command}`" not in text] == []
