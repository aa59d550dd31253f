"""A temporary copy of the project on the micro profile. No test reads the committed params.yaml or results."""

import contextlib
import fcntl
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.run import ENVIRONMENT

for _name, _value in ENVIRONMENT.items():  # before numpy and torch, which read it when they are imported
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).parent.parent
yaml = YAML(typ="safe")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))  # of make
ALONE = "unshare -rn"  # a network namespace whose only interface is a loopback that is down


def can_run(command: str) -> bool:
    """Whether this machine lets users create a namespace; on CI it must, so that no test is skipped silently."""
    return "CI" in os.environ or not subprocess.run(f"{command} true", shell=True, capture_output=True).returncode


alone_possible = can_run(ALONE)


def copy_project(directory: Path, profile: str = "micro") -> Path:
    """Copy what the stages need, uncommitted edits included, into a new directory; its params.yaml is `profile`."""
    ignore = shutil.ignore_patterns("__pycache__", "*.partial")
    shutil.copytree(ROOT / "pipeline", directory / "pipeline", ignore=ignore)
    (directory / ".dvc").mkdir()
    for name in ("dvc.yaml", "pyproject.toml", ".dvc/config", ".dvcignore", "constraints.txt"):
        shutil.copyfile(ROOT / name, directory / name)
    shutil.copytree(ROOT / ".dvc/plots", directory / ".dvc/plots")
    shutil.copyfile(ROOT / "profiles" / f"{profile}.yaml", directory / "params.yaml")
    return directory


def stages(directory: Path) -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml, in its order, which is an order in which they can run."""
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
    # A make that a test starts below `make test` would otherwise act as a part of it.
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


def output_of(directory: Path, command: str, **environment: str) -> str:
    """What a shell command prints that has to succeed."""
    done = run_command(directory, command, **environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def dvc_here(*arguments: str) -> str:
    """What a command of DVC prints in the working directory, run in this process: another one imports for seconds."""
    from dvc.cli import main

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("DVC_TEST", "1")  # or it puts back the stdout that it found when it was imported
        assert main(list(arguments)) == 0
    return printed.getvalue()


def refused(done: subprocess.CompletedProcess[str], *words: str) -> str:
    """The one sentence with which a command ended: status 1, no traceback, and each of `words` in it."""
    assert done.returncode == 1, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert [word for word in words if word not in sentence] == [], sentence
    return sentence


def repro(directory: Path, *arguments: str, **environment: str) -> list[str]:
    """The stages that `dvc repro` ran, from its output: its exit status does not tell."""
    return stages_named(output_of(directory, " ".join(["python3 -m dvc repro", *arguments]), **environment))


def stages_named(output: str) -> list[str]:
    """The stages that an output of `dvc repro` says are run."""
    lines = [line for line in output.splitlines() if line.startswith("Running stage '")]
    return [line.split("'")[1] for line in lines]


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], str]) -> Path:
    """The directory `name` that all pytest workers of a run share; the first that needs it makes it.

    `make` returns what went wrong, or an empty string; the tests that need the directory then fail with that.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            directory.mkdir()
            done.write_text(make(directory))
    if problem := done.read_text():
        pytest.fail(problem, pytrace=False)
    return directory


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of tests/connects.c, for LD_PRELOAD."""

    def compile_library(directory: Path) -> str:
        done = run_command(ROOT, f"${{CC:-cc}} -Wall -shared -fPIC -o {directory}/connects.so tests/connects.c -ldl")
        return done.stderr if done.returncode else ""

    return shared(tmp_path_factory, "watch", compile_library) / "connects.so"


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory, watch: Path) -> Path:
    """A project in which `dvc repro` has run once on the micro profile. Shared by all tests: copy it to change it.

    What the stages printed is in the file `printed` beside it, what they looked up or connected to in `connects`; they
    ran without a network. With MICRO in the environment, such a directory of an earlier run is used with this tree's
    code: benchmarks/mutations.py.
    """

    def run(directory: Path) -> str:
        project = directory / "project"
        if ready := os.environ.get("MICRO"):
            shutil.copytree(ready, directory, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(project / "pipeline")
            shutil.copytree(ROOT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
            for name in ("dvc.yaml", ".dvc/config"):
                shutil.copyfile(ROOT / name, project / name)
            return ""
        copy_project(project)
        shutil.copyfile(ROOT / ".gitignore", project / ".gitignore")
        subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
        watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(directory / "connects")}
        alone = f"{ALONE} " if alone_possible else ""
        result = run_command(project, f"{alone}python3 -m dvc repro", **watched)
        (directory / "printed").write_text(result.stdout + result.stderr)
        return result.stdout[-2000:] + result.stderr[-2000:] if result.returncode else ""

    return shared(tmp_path_factory, "micro", run) / "project"


@pytest.fixture
def project(micro: Path, tmp_path: Path) -> Path:
    """A copy of `micro` to change: DVC's outputs are write-protected links into its cache, these are plain files."""
    directory = Path(shutil.copytree(micro, tmp_path / "project"))
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)
    return directory
