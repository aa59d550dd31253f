"""Sections of the pages that tell how to change something, run as they stand on the micro profile."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.branches import commit, git, link_environment
from tests.conftest import ROOT, output_of, run_command, set_params, stages_named, yaml
from tests.pages import blocks, commands

TABLE, EXTEND = "docs/own-questions.md", "docs/extend.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole project, uncommitted edits included, with the run of the profile micro; origin/main is that run."""
    directory = tmp_path_factory.mktemp("docs") / "medical-reasoner"
    directory.mkdir()
    listed = "git ls-files --cached --others --exclude-standard | grep -vE '^(metrics/|.dvc/release/|dvc.lock)'"
    output_of(ROOT, f"{listed} | tar -c --ignore-failed-read -T - 2>/dev/null | tar -x -C {directory}")
    shutil.copytree(micro, directory, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    git(directory, "init", "--quiet", "--initial-branch=main")
    output_of(directory, "python3 -m dvc cache dir --quiet --local ../cache && python3 -m dvc commit --quiet --force")
    commit(directory, "a run")
    git(directory, "remote", "add", "origin", ".")
    git(directory, "fetch", "--quiet", "origin")
    return directory


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Path:
    """A copy of it to change, with an environment that counts as set up."""
    directory = Path(shutil.copytree(repository, tmp_path / "medical-reasoner", symlinks=True))
    output_of(directory, f"python3 -m dvc cache dir --quiet --local {repository.parent}/cache")
    link_environment(directory)
    return directory


def test_a_question_is_asked_as_readme_says(project: Path) -> None:
    (block,) = [block.text for block in blocks("sh", "README.md") if "pipeline ask" in block.text]
    assert re.search(r"^(yes|no|maybe) \d+\.\d%", output_of(project, f"set -e\n{block}"), re.MULTILINE)


def test_a_parameter_is_changed_and_compared(project: Path) -> None:
    set_params(project, "report", confidence=0.9)
    before = output_of(project, commands("docs/change.md", "Before the run"))
    assert re.search(r"report\.confidence\W+0\.95\W+0\.9", before)
    assert stages_named(before) == ["report"]
    after = output_of(project, commands("docs/change.md", "Run and compare"))
    assert stages_named(after) == ["report"]
    assert "tuned.accuracy.low" in after
    output_of(project, commands("docs/change.md", "Go back"))
    assert output_of(project, "git diff --stat HEAD; python3 -m dvc status") == "Data and pipelines are up to date.\n"


def test_own_questions_come_from_a_table_to_a_measured_gguf(project: Path) -> None:
    rows = ["id,question,abstract,answer,conclusion"]
    for number in range(60):
        answer = ("yes", "no", "maybe")[number % 3]
        rows.append(f'q-{number},Does it help in {number}?,"Trial {number}: {answer}.",{answer},It is {answer}.')
    (project.parent / "my-questions.csv").write_text("\n".join(rows) + "\n")
    printed = output_of(project, commands(TABLE, "1. Turn the table into question files"))
    assert "No problems" in output_of(project, commands(TABLE, "2. Check the files"))
    params: dict[str, Any] = yaml.load(project / "params.yaml")
    params["download"] = yaml.load(printed.partition("\n\n")[2])["download"]
    YAML().dump(params, project / "params.yaml")
    assert stages_named(output_of(project, commands(TABLE, "3. Name them in params.yaml"))) == ["download", "format"]
    assert "Data: own data" in output_of(project, commands(TABLE, "4. Run"))
    assert not json.loads((project / "metrics/compare.json").read_text())["simulated"]


def test_another_prompt_is_another_version_and_the_tests_show_its_digest(project: Path) -> None:
    done = run_command(project, commands("docs/prompt.md", "The other words"))
    assert done.returncode == 1, done.stderr
    for protocol in ("chat", "question_only"):
        assert re.search(rf"\('{protocol}', 2\).*[0-9a-f]{{16}}", done.stdout), done.stdout


def test_a_parameter_is_added(project: Path) -> None:
    assert "train" in stages_named(output_of(project, commands(EXTEND, "Add a parameter")))
    output_of(project, "ruff format --check pipeline && ruff check pipeline")


def test_a_stage_is_added(project: Path) -> None:
    output_of(project, "python3 -m benchmarks.record")  # the tables, whatever this run's figures are
    assert stages_named(output_of(project, commands(EXTEND, "Add a stage"))) == ["errors"]
    found = json.loads((project / "metrics/errors.json").read_text())
    figures = json.loads((project / "metrics/compare.json").read_text())
    assert found["wrong"] == round(figures["questions"] * (1 - figures["tuned"]["accuracy"]["value"]))
    assert 0 <= found["wrong_and_confident"] <= found["wrong"]
    assert "| `errors` |" in (project / "README.md").read_text()
    output_of(project, "ruff format --check pipeline && ruff check pipeline && lint-imports --no-logo")


def test_a_package_is_upgraded(project: Path) -> None:
    """With a version that is not installed, and a set-up that installs nothing, so that the first stage refuses."""
    (project / "setup/install.sh").write_text("#!/bin/sh\ntouch .venv/ready\n")
    script, count = re.subn(r"jinja2==\d[\d.]+", "jinja2==0.1", commands(EXTEND, "Upgrade a package"))
    done = run_command(project, script)
    assert count == 1
    extras = tomllib.loads((project / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lists = {name for name, pins in extras.items() if "jinja2==0.1" in pins}
    tracked = yaml.load(project / "dvc.yaml")["stages"].items()
    reached = {name for name, stage in tracked if any(f"dependencies.{one}'" in str(stage["params"]) for one in lists)}
    assert set(re.findall(r"^(\w+):$", done.stdout, re.MULTILINE)) >= reached > {"format"}
    assert re.search(r"jinja2 is \d[\d.]+, pinned 0\.1", done.stderr)


def test_an_edit_that_changes_no_result_is_recorded(project: Path) -> None:
    printed = output_of(project, commands(EXTEND, "Record an edit that changes no result"))
    assert "pipeline/core/files.py" in printed
    assert printed.rstrip().endswith("Data and pipelines are up to date.")


def test_a_change_is_reviewed(project: Path) -> None:
    block = next(block.text for block in blocks("sh", "docs/review.md") if "make gate" in block.text)
    lock, gate, comment = (run_command(project, line) for line in block.splitlines())
    assert "lock: dvc.lock agrees" in lock.stdout
    # Whether three steps of training beat the base is chance; tests/unit/test_gate.py has what passes.
    assert (gate.returncode, "gate: passed" in gate.stdout) in ((0, True), (2, False)), gate.stderr
    assert comment.returncode == 0, comment.stderr
    assert "## Gate: " in comment.stdout
