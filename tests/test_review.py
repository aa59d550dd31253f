"""Review on the micro run, with git and DVC: is dvc.lock in step, and the way out of its conflicts."""

import re
import shutil
from pathlib import Path

import pytest
from branches import commit, git, link_environment
from conftest import ROOT, run_command, yaml


@pytest.fixture(scope="module")
def committed(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro run as a repository whose data and models are in DVC's cache, with a store beside it."""
    directory = Path(shutil.copytree(micro, tmp_path_factory.mktemp("review") / "project"))
    shutil.copyfile(ROOT / ".gitignore", directory / ".gitignore")
    git(directory, "init", "--quiet", "--initial-branch=main")
    dvc(directory, "remote add --quiet --force --default store ../store")
    dvc(directory, "commit --quiet --force")
    commit(directory, "a run")
    return directory


def dvc(directory: Path, arguments: str) -> str:
    done = run_command(directory, f"python3 -m dvc {arguments}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.unlink()
    path.write_text(text.replace(old, new))


@pytest.fixture
def clone(committed: Path, tmp_path: Path) -> Path:
    """A fresh clone: no data, no models, no cache."""
    git(tmp_path, "clone", "--quiet", str(committed), "clone")
    return tmp_path / "clone"


@pytest.mark.parametrize(
    ("path", "old", "new", "stale"),
    [
        ("params.yaml", "lora_alpha: 16", "lora_alpha: 16", None),
        ("params.yaml", "lora_alpha: 16", "lora_alpha: 32", "train, merge, quantize, evaluate, reference, report"),
        ("metrics/baseline.json", '"majority_accuracy": 0', '"majority_accuracy": 1', "baseline, report"),
        ("pipeline/stages/report.py", "Everything", "All", "report"),
    ],
    ids=["clone", "parameter", "result", "code"],
)
def test_make_lock_knows_without_data_whether_dvc_lock_is_in_step(
    path: str, old: str, new: str, stale: str | None, clone: Path
) -> None:
    edit(clone / path, old, new)
    done = run_command(clone, "python3 -m pipeline.commands.lock")
    if stale is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        assert f"parameters and results of {stale} (those" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert git(clone, "status", "--porcelain").split() == (["M", path] if stale else [])  # it changed nothing


def test_a_run_that_was_put_back_in_params_yaml_alone_is_out_of_step_though_cached(committed: Path) -> None:
    """With everything in the run cache DVC says 'is cached' in place of 'Running'."""
    edit(committed / "params.yaml", "bins: 10", "bins: 9")
    try:
        done = run_command(committed, "python3 -m pipeline.commands.lock")
    finally:
        edit(committed / "params.yaml", "bins: 9", "bins: 10")
    assert "results of report (those" in done.stderr


def test_the_documented_way_out_of_a_conflict_in_dvc_lock(committed: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(committed, tmp_path / "project", symlinks=True))
    git(project, "switch", "--quiet", "--create", "change")
    for branch, old, new in (("change", "bins: 10", "bins: 8"), ("main", "samples: 10000", "samples: 2000")):
        git(project, "switch", "--quiet", branch)
        edit(project / "params.yaml", old, new)
        assert "Running stage 'report'" in dvc(project, "repro")
        commit(project, f"{branch}: {new}")
    git(project, "switch", "--quiet", "change")

    page = (ROOT / "docs/review.md").read_text()
    (block,) = re.findall(r"runs these lines -->\n```sh\n(.*?)```", page, re.DOTALL)
    for name in ("Makefile", "constraints.txt"):
        shutil.copyfile(ROOT / name, project / name)
    link_environment(project)
    commit(project, "what make needs")
    merge, *way_out = block.splitlines()
    assert "CONFLICT (content): Merge conflict in dvc.lock" in run_command(project, merge).stdout
    lines = ["git config user.name A", "git config user.email a@example.org", *way_out]
    done = run_command(project, 'set -e; dvc() { python3 -m dvc "$@"; }\n' + "\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"Running stage '(\w+)'", done.stdout) == ["report"]

    assert git(project, "status", "--porcelain") == ""
    assert git(project, "log", "-1", "--format=%p").count(" ") == 1  # a merge of two parents
    params = yaml.load(project / "params.yaml")["report"]
    assert (params["bins"], params["bootstrap_samples"]) == (8, 2000)
    locked = yaml.load(project / "dvc.lock")["stages"]["report"]["params"]["params.yaml"]["report"]
    assert locked == params
    assert run_command(project, "python3 -m pipeline.commands.lock").returncode == 0
    assert any((project.parent / "store").rglob("*"))  # pushed
