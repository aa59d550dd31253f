"""The workflows do what the Makefile can do too, with no more rights than they need."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_command, yaml

from pipeline.commands.comment import MARK

ACTION = ROOT / ".github/actions/setup/action.yml"
WORKFLOWS = {path.stem: yaml.load(path) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]
NAMESPACES = "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
every_job = pytest.mark.parametrize(("name", "job"), JOBS)


def job_of(name: str, job: str) -> dict[str, Any]:
    return WORKFLOWS[name]["jobs"][job]


def steps() -> Iterator[dict[str, Any]]:
    for name, job in JOBS:
        yield from job_of(name, job)["steps"]
    yield from yaml.load(ACTION)["runs"]["steps"]


def actions(name: str, job: str) -> list[str]:
    return [step["uses"].split("@")[0] for step in job_of(name, job)["steps"] if "uses" in step]


def commands(name: str, job: str) -> list[str]:
    return [step["run"] for step in job_of(name, job)["steps"] if "run" in step]


def test_ci_checks_tests_and_asks_the_lock() -> None:
    assert commands("ci", "ci") == ["make check", "make lock", NAMESPACES, "make test"]


def test_what_ci_leaves_out_runs_at_night_set_up_as_there() -> None:
    assert commands("nightly", "slow") == [NAMESPACES, "make test ARGS='-m slow'"]
    assert actions("nightly", "slow") == actions("ci", "ci")
    assert job_of("nightly", "slow")["runs-on"] == job_of("ci", "ci")["runs-on"]
    assert set(WORKFLOWS["nightly"]["on"]) == {"schedule", "workflow_dispatch"}


def test_the_report_comes_before_the_gate_which_may_refuse() -> None:
    assert commands("report", "report") == [
        "make comment >comment.md",
        'cat comment.md >>"$GITHUB_STEP_SUMMARY"',
        "make gate",
    ]


def test_every_target_that_is_made_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {name for step in steps() for name in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
    assert {"check", "test", "lock", "comment", "gate", "setup"} <= made <= targets


def test_every_action_is_pinned_by_its_commit_with_the_release_told() -> None:
    for path in [*(ROOT / ".github/workflows").glob("*.yml"), ACTION]:
        lines = re.findall(r"uses: (.*)", path.read_text())
        assert lines
        for line in lines:
            pinned = re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
            assert pinned or (ROOT / line / "action.yml").is_file(), f"{path.name}: {line}"


def test_a_script_holds_no_expression_which_a_branch_or_title_could_fill() -> None:
    assert [step["run"] for step in steps() if "${{" in step.get("run", "")] == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_event_gives_a_stranger_s_code_a_token_that_writes(name: str) -> None:
    # The last two run what is in the repository, at the wish of those who can write there.
    assert set(WORKFLOWS[name]["on"]) <= {"push", "pull_request", "schedule", "workflow_dispatch"}
    assert WORKFLOWS[name]["permissions"] in ({}, {"contents": "read"})
    assert "secrets." not in (ROOT / f".github/workflows/{name}.yml").read_text()


@every_job
def test_a_job_that_can_write_runs_no_code_of_the_branch(name: str, job: str) -> None:
    rights = job_of(name, job).get("permissions", WORKFLOWS[name]["permissions"])
    if "write" in rights.values():
        assert rights == {"pull-requests": "write"}
        assert actions(name, job) == ["actions/download-artifact"]
        assert not [step for step in job_of(name, job)["steps"] if "make" in step.get("run", "").split()]


@every_job
def test_a_checkout_leaves_no_token_behind(name: str, job: str) -> None:
    for step in job_of(name, job)["steps"]:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@every_job
def test_a_job_ends_and_a_later_push_replaces_it(name: str, job: str) -> None:
    assert job_of(name, job)["timeout-minutes"] <= (120 if name == "nightly" else 45)  # nobody waits at night
    assert WORKFLOWS[name]["concurrency"]["group"].startswith(f"{name}-${{{{ github.")


def test_what_is_cached_is_where_set_up_keeps_its_wheels() -> None:
    (cache,) = (step for step in steps() if step.get("uses", "").startswith("actions/cache@"))
    folder = cache["with"]["path"].removeprefix("~/.cache/")
    assert f".cache}}/{folder}/llama.cpp-" in (ROOT / "setup/install.sh").read_text()


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
    assert listed.startswith("api --paginate repos/a/b/issues/7/comments --jq ")
    assert MARK in listed
    if earlier:
        assert written == ["api --silent --method PATCH repos/a/b/issues/comments/41 --field body=@comment.md"]
    else:
        assert written == ["pr comment 7 --body-file comment.md"]
