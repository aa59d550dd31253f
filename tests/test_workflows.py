"""The workflows have no more rights than they need, and name targets that exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TARGETS, run_command, yaml

ACTION = ROOT / ".github/actions/setup/action.yml"
WORKFLOWS = {path.stem: yaml.load(path) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]
every_job = pytest.mark.parametrize(("name", "job"), JOBS)


def job_of(name: str, job: str) -> dict[str, Any]:
    return WORKFLOWS[name]["jobs"][job]


def steps() -> Iterator[dict[str, Any]]:
    for name, job in JOBS:
        yield from job_of(name, job)["steps"]
    yield from yaml.load(ACTION)["runs"]["steps"]


def test_every_target_that_is_made_exists() -> None:
    assert {name for step in steps() for name in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))} <= TARGETS


def test_every_action_is_pinned_by_its_commit() -> None:
    for path in [*(ROOT / ".github/workflows").glob("*.yml"), ACTION]:
        for line in re.findall(r"uses: (.*)", path.read_text()):
            pinned = re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
            assert pinned or (ROOT / line / "action.yml").is_file(), f"{path.name}: {line}"


def test_a_script_contains_no_expression_which_a_branch_or_title_could_fill() -> None:
    assert [step["run"] for step in steps() if "${{" in step.get("run", "")] == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_event_gives_the_code_of_a_fork_a_token_that_writes(name: str) -> None:
    assert set(WORKFLOWS[name]["on"]) <= {"push", "pull_request", "schedule", "workflow_dispatch"}
    assert WORKFLOWS[name]["permissions"] in ({}, {"contents": "read"})
    assert "secrets." not in (ROOT / f".github/workflows/{name}.yml").read_text()


@every_job
def test_a_job_that_can_write_runs_no_code_of_the_branch(name: str, job: str) -> None:
    rights = job_of(name, job).get("permissions", WORKFLOWS[name]["permissions"])
    if "write" in rights.values():
        used = [step["uses"].split("@")[0] for step in job_of(name, job)["steps"] if "uses" in step]
        assert rights == {"pull-requests": "write"}
        assert used == ["actions/download-artifact"]
        assert not [step for step in job_of(name, job)["steps"] if "make" in step.get("run", "").split()]


def test_a_checkout_leaves_no_token_behind() -> None:
    checkouts = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert [step["with"]["persist-credentials"] for step in checkouts] == [False] * len(checkouts)


@pytest.mark.parametrize("earlier", ["", "41"])
def test_one_comment_is_made_and_then_updated(earlier: str, tmp_path: Path) -> None:
    """The step's own script, with a `gh` that writes down what it is asked."""
    gh = tmp_path / "gh"
    gh.write_text('#!/bin/sh\necho "$@" >>asked\ncase "$*" in *--paginate*) printf "%s" "$EARLIER";; esac\n')
    gh.chmod(0o755)
    (step,) = (step for step in job_of("report", "comment")["steps"] if "run" in step)
    environment = {"GH_REPO": "a/b", "NUMBER": "7", "EARLIER": earlier, "SCRIPT": step["run"]}
    done = run_command(tmp_path, 'PATH="$PWD:$PATH" bash -e -c "$SCRIPT"', **environment)
    assert done.returncode == 0, done.stderr
    listed, *written = (tmp_path / "asked").read_text().splitlines()
    mark = (ROOT / "pipeline/reporting/templates/comment.md.j2").read_text().splitlines()[0]
    assert mark in listed
    if earlier:
        assert written == ["api --silent --method PATCH repos/a/b/issues/comments/41 --field body=@comment.md"]
    else:
        assert written == ["pr comment 7 --body-file comment.md"]
