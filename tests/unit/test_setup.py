"""The environment is what pyproject.toml and constraints.txt say, and set-up refuses what it cannot do."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipeline.core.errors import Fail
from pipeline.core.packages import check_packages
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# torch's CUDA build brings these, at the versions that it names.
CHOSEN_BY_TORCH = ("cuda-", "nvidia-", "triton")


def constraints(name: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("group", ["dependencies", *EXTRAS])
def test_pins_of_pyproject_are_exact_and_those_of_constraints(group: str):
    pins = [Requirement(pin) for pin in EXTRAS.get(group, PROJECT["dependencies"])]
    pinned = constraints("constraints-gpu.txt" if group == "unsloth" else "constraints.txt")
    expected = {pin.name: f"=={pinned.get(canonicalize_name(pin.name))}" for pin in pins}
    assert {pin.name: str(pin.specifier) for pin in pins} == expected


def test_constraints_cover_everything_installed():
    found = [d for d in distributions() if Path(str(d.locate_file(""))).is_relative_to(sys.prefix)]
    here = {canonicalize_name(d.name): Version(d.version).public for d in found}  # without a local tag such as +cpu
    pinned = constraints()
    names = {name for name in here.keys() | pinned.keys() if not name.startswith(CHOSEN_BY_TORCH)}
    differ = {name: (here.get(name), pinned.get(name)) for name in names if here.get(name) != pinned.get(name)}
    assert differ == {}, "(installed, in constraints.txt): `make setup`, or `make constraints` after a change of pins"


def test_constraints_gpu_covers_what_a_card_runs():
    """The stages, an S3 remote and what compiles llama.cpp: the set is installed as it is, and nothing beside it."""
    groups = [PROJECT["dependencies"], *(EXTRAS[name] for name in EXTRAS.keys() - {"server", "test", "dev"})]
    names = {canonicalize_name(Requirement(pin).name) for group in groups for pin in group}
    assert {"pytest", "xformers", *names} - constraints("constraints-gpu.txt").keys() == set()


@pytest.mark.parametrize(
    ("pin", "ready", "words"),
    [
        ("pydantic==0.1", None, ""),  # an environment that set-up did not make
        ("pydantic==0.1", "", "differ from constraints.txt: pydantic is .*, pinned 0.1"),
        ("pydantic==0.1", "gpu.txt\n", "differ from gpu.txt: pydantic is .*, pinned 0.2"),
        ("not-there==0.1", "", ""),
        ("pydantic", "", ""),
    ],
)
def test_a_stage_refuses_to_run_with_another_version_of_a_package_that_it_tracks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin: str, ready: str | None, words: str
):
    monkeypatch.chdir(tmp_path)
    entry = "{pyproject.toml: [project.optional-dependencies.toy]}"
    Path("dvc.yaml").write_text(f"stages: {{toy: {{params: [toy, {entry}]}}}}")
    Path("pyproject.toml").write_text(f"project.optional-dependencies = {{toy = ['{pin}'], other = ['numpy==0.1']}}")
    Path("gpu.txt").write_text("pydantic==0.2\n")
    if ready is not None:
        Path("ready").write_text(ready)
    if not words:
        check_packages("toy", tmp_path)
        return
    with pytest.raises(Fail, match=words):
        check_packages("toy", tmp_path)


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """The one sentence of a set-up that refuses, in a copy of the project; it printed `said` and made nothing."""
    shutil.copytree(ROOT / "setup", tmp_path / "project" / "setup")

    def run(said: str = "", **variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in {"CC", "CXX", "GPU", "PYTHON", "TORCH_INDEX"}}
        command = [tmp_path / "project" / "setup" / "install.sh"]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, said, 1)
        assert not (tmp_path / "project" / ".venv").exists()
        return done.stderr

    return run


@pytest.mark.parametrize(
    ("python", "wanted"), [("3.10.4", False), ("3.11.2", True), ("3.12.1", True), ("3.14.0", True), ("3.15.0", False)]
)
def test_setup_supports_the_pythons_of_pyproject(tmp_path: Path, refusal: Refusal, python: str, wanted: bool):
    version = f"import sys; sys.version_info = ({python.replace('.', ', ')}); $2"
    script = f'if [ "$2" = "import ensurepip, venv" ]; then exit 1; fi\nexec "{sys.executable}" -c "{version}"'
    fake = executable(tmp_path / "python", script)
    message = "lacks the venv module" if wanted else f"is Python {python.rpartition('.')[0]}"
    assert message in refusal(PYTHON=str(fake))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python) == wanted


def test_setup_without_a_compiler_is_refused(refusal: Refusal):
    assert "no working C and C++ compiler" in refusal(CXX="no-such-compiler")


DF = "echo header\necho tmpfs 9000000 7000000 2000000 78% /"


def test_a_compiler_with_a_static_libstdcxx_alone_gives_way_to_the_systems_or_is_refused(
    tmp_path: Path, refusal: Refusal
):
    (tmp_path / "libstdc++.a").touch()
    asked = f"-print-file-name=*.a) echo {tmp_path}/libstdc++.a ;;\n-print-file-name=*) echo libstdc++.so ;;"
    static = executable(tmp_path / "g++", f'case $1 in\n{asked}\n*) exec /usr/bin/c++ "$@" ;;\nesac')
    executable(tmp_path / "df", DF)
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = f"setup: {static} has no shared libstdc++: {shutil.which('c++')} compiles in its place\n"
    assert "13 GB of free disk" in refusal(said, PATH=path, CXX=str(static))
    (tmp_path / "c++").symlink_to(static)
    assert "has no shared libstdc++, and with a static one" in refusal(PATH=path, CXX=str(static))


@pytest.mark.parametrize(("index", "needed"), [("", "13 GB"), ("x/cpu", "4 GB")])
def test_setup_without_disk_is_refused(tmp_path: Path, refusal: Refusal, index: str, needed: str):
    executable(tmp_path / "df", DF)
    assert f"{needed} of free disk" in refusal(PATH=f"{tmp_path}:{os.environ['PATH']}", TORCH_INDEX=index)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("", "nvidia-smi finds no card"),
        ("Tesla K80, 3.7, 470.256", "compute capability 7.5 (a T4) and newer, and Tesla K80 has 3.7"),
        ("Tesla T4, 7.5, 550.54", "needs driver 580 or newer, and this is 550.54"),
        ("Tesla T4, 7.5, 580.1", "Python 3.12 to 3.14 is needed"),
    ],
)
def test_a_card_is_checked_before_any_download(tmp_path: Path, refusal: Refusal, card: str, message: str):
    for name in ("nvidia-smi", "nvcc"):
        executable(tmp_path / name, f"[ -z '{card}' ] || echo '{card}'")
    assert message in refusal(GPU="1", PATH=f"{tmp_path}:{os.defpath}", PYTHON="no-such-python")
