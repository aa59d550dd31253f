"""The gate and the comment of a pull request, in repositories with two branches and no data."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from branches import BASE, TUNED, commit, git, link_environment, repository, table, write
from conftest import run_command, set_params

from pipeline.commands.gate import judge
from pipeline.core.stage import Fail

GOLDEN = Path(__file__).parent / "comment.md"
BASE_TABLE = table(range(100), ("chat", "lm_eval"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("branches") / "project")


@pytest.fixture
def project(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = Path(shutil.copytree(original, tmp_path / "project"))
    monkeypatch.chdir(directory)
    return directory


# Beyond the paired interval, or below the base


@pytest.mark.parametrize(
    ("wrong", "passed"),
    [
        (range(40), True),  # the same answers
        (range(20), True),
        (range(4, 47), True),  # 7 lost, 4 gained: noise
        (range(43), True),  # 3 lost, none gained: a sample has none of them with a chance of e^-3, more than 2.5 %
        (range(44), False),  # 4 lost: e^-4 is less
        (range(60), False),
    ],
)
def test_worse_than_main_is_an_interval_wholly_below_zero(project: Path, wrong: range, passed: bool) -> None:
    write(project, table(wrong), BASE_TABLE)
    judgement = judge("main")
    assert judgement.main
    assert judgement.main["accuracy"] == pytest.approx((40 - len(wrong)) / 200)
    assert judgement.passed == passed == (judgement.main["accuracy_high"] >= 0)
    assert ("worse than that of main" in judgement.sentence) == (not passed)
    assert f"{100 * judgement.main['accuracy']:+.1f} points of accuracy" in judgement.sentence


def test_worse_than_the_base_is_any_loss_of_accuracy(project: Path) -> None:
    write(project, table(range(40)), table(range(39)))
    judgement = judge("main")
    assert not judgement.passed
    assert "worse than its own base" in judgement.sentence
    write(project, table(range(40)), table(range(40)))
    assert judge("main").passed


def test_the_base_is_credited_with_its_better_protocol(project: Path) -> None:
    harness = table(range(10), ("lm_eval",)).splitlines(keepends=True)[1:]
    write(project, table(range(40)), table(range(100)) + "".join(harness))
    assert "worse than its own base" in judge("main").sentence


def test_a_model_that_is_worse_than_both_is_refused_for_both(project: Path) -> None:
    write(project, table(range(150)), BASE_TABLE)
    assert "worse than that of main and its own base: " in judge("main").sentence


def test_the_interval_is_that_of_the_report(project: Path) -> None:
    write(project, table(range(4, 47)), BASE_TABLE)
    set_params(project, "report", confidence=0.51)  # the interval narrows until the loss is beyond it
    assert not judge("main").passed


# What cannot be compared is judged against the base alone


def no_table(project: Path) -> None:
    (project / TUNED).unlink()


def older_format(project: Path) -> None:
    path = project / TUNED
    path.write_text("\n".join(",".join(line.split(",")[1:-1]) for line in path.read_text().splitlines()))


def other_questions(project: Path) -> None:
    (project / TUNED).write_text(table(range(40), first=2000))


def other_labels(project: Path) -> None:
    path = project / TUNED
    path.write_text(path.read_text().replace("1199,no,", "1199,yes,"))


def other_version(project: Path) -> None:
    (project / "metrics/evaluate.json").write_text(json.dumps({"chat": {"version": 2}}))


def older_metrics(project: Path) -> None:
    (project / "metrics/evaluate.json").write_text(json.dumps({"accuracy": 0.8}))


def conflict_in_metrics(project: Path) -> None:
    (project / "metrics/evaluate.json").write_text("<<<<<<< HEAD\n")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (no_table, "it has no metrics/predictions/tuned.csv"),
        (older_format, "is not a table of predictions"),
        (other_questions, "answered different questions: PMID 1000 is in one table only"),
        (other_labels, "scored against different labels: PMID 1199"),
        (other_version, "its protocol chat is of version 2"),
        (older_metrics, "its protocol chat is of an older format"),
        (conflict_in_metrics, "its protocol chat is of an older format"),
    ],
)
def test_what_cannot_be_compared_is_judged_against_the_base_alone(
    project: Path, edit: Callable[[Path], None], reason: str
) -> None:
    git(project, "switch", "--quiet", "main")
    edit(project)
    commit(project, "another main")
    git(project, "switch", "--quiet", "change")
    write(project, table(range(90)), BASE_TABLE)  # far worse than main, better than the base
    judgement = judge("main")
    assert judgement.passed
    assert judgement.main is None
    assert "not compared with main, as " in judgement.sentence
    assert reason in judgement.sentence
    assert "\n" not in judgement.sentence
    write(project, table(range(150)), BASE_TABLE)
    assert not judge("main").passed


def test_what_is_not_here_is_a_failure_not_a_pass(project: Path) -> None:
    (project / TUNED).write_text(table([], ()))
    with pytest.raises(Fail, match=r"tuned\.csv has no answers under the protocol chat; run `dvc repro`"):
        judge("main")
    (project / TUNED).unlink()
    with pytest.raises(Fail, match=r"tuned\.csv is missing; run `dvc repro`"):
        judge("main")


def test_a_base_that_answered_other_questions_is_no_base_to_compare_with(project: Path) -> None:
    (project / BASE).write_text(table(range(100), first=2000))
    with pytest.raises(Fail, match=r"base\.csv and .*tuned\.csv answered different questions: PMID 1000"):
        judge("main")


# Git


def test_without_a_repository_or_git_it_says_so(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(project / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(Fail, match="no git repository"):
        judge("main")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Fail, match="git is not installed"):
        judge("main")


def test_a_shallow_clone_lacks_the_main_branch_and_the_command_that_it_names_brings_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, table(range(60)), BASE_TABLE)
    commit(project, "worse")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", "--branch=change", f"file://{project}", str(clone))
    monkeypatch.chdir(clone)
    with pytest.raises(Fail, match="git does not know origin/main here") as error:
        judge("origin/main")
    fetch = re.findall(r"`(git fetch [^`]*)`", str(error.value))[0]
    subprocess.run([*fetch.split(), "--quiet", "--depth=1"], check=True, capture_output=True)
    assert "worse than that of origin/main" in judge("origin/main").sentence


def test_make_gate_says_why_in_one_line_and_its_status_tells(project: Path) -> None:
    link_environment(project)
    write(project, table(range(60)), BASE_TABLE)
    done = run_command(project, "make gate MAIN=main")
    assert done.returncode != 0
    why, make = done.stderr.splitlines()
    assert why.startswith("gate: the tuned model is worse than that of main: -10.0 points")
    assert make.startswith("make: ***")
    write(project, table(range(40)), BASE_TABLE)
    done = run_command(project, "make gate MAIN=main")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gate: passed: ")
    assert len(done.stdout.splitlines()) == 1
    done = run_command(project, "make gate")
    assert "git does not know origin/main here" in done.stderr


# The comment


def test_the_comment_is_the_golden_one(project: Path) -> None:
    """After a wanted change of the comment, put the new one into tests/unit/comment.md, and read the difference."""
    link_environment(project)
    set_params(project, "train", lora_alpha=32)
    write(
        project,
        table(range(4, 38)),
        BASE_TABLE,
        train={"last_loss": 1.0, "validation_loss": 1.4375},
        train_resources={"peak_rss_mib": 901.5, "peak_vram_reserved_mib": 5410.0, "seconds": 61.0},
    )
    commit(project, "a change")
    done = run_command(project, "make comment MAIN=main PICTURES=https://example.org/0123abc/metrics/pictures")
    assert done.returncode == 0, done.stderr
    assert done.stdout == GOLDEN.read_text(encoding="utf-8")


def test_the_comment_is_made_of_what_cannot_be_compared_too(project: Path) -> None:
    git(project, "switch", "--quiet", "main")
    (project / TUNED).unlink()
    (project / BASE).unlink()
    (project / "metrics/train.json").unlink()
    commit(project, "no results")
    git(project, "switch", "--quiet", "change")
    done = run_command(project, f"{sys.executable} -m pipeline.commands.comment main")
    assert done.returncode == 0, done.stderr
    assert "not compared with main, as it has no metrics/predictions/tuned.csv" in done.stdout
    assert "| accuracy | 80.0% | 80.0% |  |" in done.stdout
    assert "| validation loss |  | 1.5000 |  |" in done.stdout
    assert "### Parameters that differ\n\nNone.\n" in done.stdout
