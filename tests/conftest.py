"""A temporary copy of the project on the micro profile. Nothing here reads the committed params.yaml or dvc.lock."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import pipeline  # noqa: F401  # before numpy and torch: it sets what they read when they are loaded

ROOT = Path(__file__).parent.parent
yaml = YAML(typ="safe")
ALONE = "unshare -rn"  # a network namespace whose only interface is a loopback that is down


def lends(command: str) -> bool:
    """Whether this machine lends a namespace; on CI it has to, so that no test is left out without a word."""
    return "CI" in os.environ or not subprocess.run(f"{command} true", shell=True, capture_output=True).returncode


alone_possible = lends(ALONE)


def copy_project(directory: Path, profile: str = "micro") -> Path:
    """Copy what the stages need, uncommitted edits included, into a new directory; its params.yaml is `profile`."""
    ignore = shutil.ignore_patterns("__pycache__", "*.partial")
    shutil.copytree(ROOT / "pipeline", directory / "pipeline", ignore=ignore)
    (directory / ".dvc").mkdir()
    for name in ("dvc.yaml", "pyproject.toml", ".dvc/config", ".dvcignore"):
        shutil.copyfile(ROOT / name, directory / name)
    shutil.copyfile(ROOT / "profiles" / f"{profile}.yaml", directory / "params.yaml")
    return directory


def stages(directory: Path) -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml, in its order, which is an order that they can run in."""
    return yaml.load((directory / "dvc.yaml").read_text())["stages"]


def set_params(directory: Path, section: str, **changes: Any) -> None:
    """Set values in a section of params.yaml; None removes the key."""
    path = directory / "params.yaml"
    params = yaml.load(path.read_text())
    values = params[section] | changes
    params[section] = {key: value for key, value in values.items() if value is not None}
    with path.open("w") as file:
        yaml.dump(params, file)


def run_command(directory: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in `directory` with the interpreter of these tests as python3, its output captured."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Below `make test`, a make that a test starts would take itself for a part of it, and say so.
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        command,
        shell=True,
        cwd=directory,
        env=inherited | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_stage(directory: Path, stage: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run a stage's `cmd` of dvc.yaml after changing its section of params.yaml."""
    if changes:
        set_params(directory, stage, **changes)
    return run_command(directory, stages(directory)[stage]["cmd"])


@contextmanager
def tried(kind: str, fault: str) -> Iterator[list[str]]:
    """A try for the table of benchmarks/faults.py, which names a file in TALLY: survived if nothing is raised.

    What the user saw has to be appended to the list, in words that a reader of the table understands.
    """
    seen: list[str] = []
    survived = False
    try:
        yield seen
        assert seen, fault
        assert seen[-1].strip() == seen[-1] != "", fault
        assert not seen[-1].startswith("<"), seen[-1]
        survived = True
    finally:
        if path := os.environ.get("TALLY"):
            row = {"kind": kind, "fault": fault, "survived": survived, "seen": seen[-1] if seen else "nothing"}
            row["test"] = os.environ["PYTEST_CURRENT_TEST"].split("::")[0]
            with Path(path).open("a") as file:
                file.write(json.dumps(row) + "\n")


def output_of(directory: Path, command: str, **environment: str) -> str:
    """What a shell command that has to succeed prints."""
    done = run_command(directory, command, **environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def repro(directory: Path, *arguments: str, **environment: str) -> list[str]:
    """The stages that `dvc repro` ran, as its output tells: its exit status says nothing about that."""
    return stages_named(output_of(directory, " ".join(["python3 -m dvc repro", *arguments]), **environment))


def stages_named(output: str) -> list[str]:
    """The stages that an output of `dvc repro` says are run."""
    lines = [line for line in output.splitlines() if line.startswith("Running stage '")]
    return [line.split("'")[1] for line in lines]


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of tests/connects.c, for LD_PRELOAD."""
    library = tmp_path_factory.mktemp("watch") / "connects.so"
    output_of(ROOT, f"${{CC:-cc}} -Wall -shared -fPIC -o {library} tests/connects.c -ldl")
    return library


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory, watch: Path) -> Path:
    """A project in which every stage has run once on the micro profile. Shared by all tests: copy it to change it.

    What the stages printed is in the file `printed` beside it, what they looked up or connected to in `connects`; they
    ran without a network. With MICRO in the environment, such a directory of an earlier run is taken for what the
    stages wrote, and only the code is this tree's: benchmarks/mutations.py.
    """
    directory = tmp_path_factory.mktemp("micro") / "project"
    if ready := os.environ.get("MICRO"):
        shutil.copytree(ready, directory.parent, dirs_exist_ok=True)
        shutil.rmtree(directory / "pipeline")
        shutil.copytree(ROOT / "pipeline", directory / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        return directory
    copy_project(directory)
    watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(directory.parent / "connects")}
    for stage, about in stages(directory).items():
        alone = f"{ALONE} sh -c '{about['cmd']}'" if alone_possible else about["cmd"]
        result = run_command(directory, alone, **watched)
        with (directory.parent / "printed").open("a") as file:
            file.write(f"{stage}\n{result.stdout}{result.stderr}")
        if result.returncode != 0:
            pytest.fail(f"{stage}: {result.stderr}", pytrace=False)
    return directory


@pytest.fixture
def project(micro: Path, tmp_path: Path) -> Path:
    """A copy of `micro` to change."""
    return Path(shutil.copytree(micro, tmp_path / "project"))


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which `dvc repro` has run once: every stage, in order."""
    directory = copy_project(tmp_path_factory.mktemp("reproduced") / "elsewhere")
    shutil.copyfile(ROOT / ".gitignore", directory / ".gitignore")
    subprocess.run(["git", "init", "--quiet"], cwd=directory, check=True)
    assert sorted(repro(directory)) == sorted(stages(directory))
    return directory
