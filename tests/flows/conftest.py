"""The micro run as a git repository, from which the tests clone machines that have what git has, and an empty cache."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import COMMANDS
from tests.branches import commit, git
from tests.conftest import ROOT, TARGETS, stages, yaml

GGUF = "models/medical-reasoner.gguf"
# In place of setup/install.sh, which takes minutes and has tests of its own.
SETUP = f"""#!/bin/sh
set -e
mkdir .venv
for entry in {sys.prefix}/*; do [ "${{entry##*/}}" = ready ] || ln -s "$entry" .venv; done
touch .venv/ready
"""


@pytest.fixture(scope="session")
def committed(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro run, committed on main with what make needs. Shared by a worker's tests: copy it to change it."""
    directory = Path(shutil.copytree(micro, tmp_path_factory.mktemp("committed") / "project", symlinks=True))
    for name in (".dvc/config", "Makefile", "profiles/micro.yaml"):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, directory / name)
    (directory / "setup").mkdir()
    (directory / "setup/install.sh").write_text(SETUP)
    (directory / "setup/install.sh").chmod(0o755)
    git(directory, "symbolic-ref", "HEAD", "refs/heads/main")
    commit(directory, "a run")
    return directory


def copy_of(directory: Path, to: Path) -> Path:
    """A copy of a repository with its data, models and cache."""
    return Path(shutil.copytree(directory, to, symlinks=True))


def hashes(project: Path) -> dict[str, str]:
    """Path -> md5 of every output in dvc.lock."""
    lock = yaml.load(project / "dvc.lock")["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}


def cached(project: Path, *names: str) -> list[str]:
    """The outputs of stages that DVC caches and pushes."""
    outs = [out for name in names for out in stages(project)[name].get("outs", [])]
    return [out for out in outs if isinstance(out, str)]  # with `cache: false` it is a mapping


def contents(project: Path) -> dict[str, str]:
    """md5 -> path of every cached output of a finished run: files, directories, and the files in those."""
    paths = {hashes(project)[path]: path for path in cached(project, *stages(project))}
    for md5, path in [item for item in paths.items() if item[0].endswith(".dir")]:
        files = json.loads((project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).read_text())
        # The release has a copy of the system prompt: of equal files, the output itself is the one that stages read.
        paths = {file["md5"]: f"{path}/{file['relpath']}" for file in files} | paths
    return paths


def pushed(store: Path, project: Path) -> bool:
    """Whether a DVC remote in a directory has the GGUF that a project's dvc.lock names."""
    md5 = hashes(project)[GGUF]
    return (store / "files/md5" / md5[:2] / md5[2:]).is_file()


def unknown_commands(script: str) -> set[str]:
    """The targets of make and the commands of `python -m pipeline` that a script gives and that do not exist."""
    given = re.findall(r"^make ([a-z-]+)", script, re.MULTILINE)
    return (set(given) - TARGETS) | (set(re.findall(r"python -m pipeline ([\w-]+)", script)) - COMMANDS.keys())
