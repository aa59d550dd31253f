"""The environment is what pyproject.toml and constraints.txt say, and set-up refuses what it cannot do."""

import io
import os
import shutil
import subprocess
import sys
import threading
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distributions
from pathlib import Path
from typing import ClassVar

import pip
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipeline.core.errors import Fail
from pipeline.core.packages import check_packages, read_pins
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# torch's CUDA build brings these, at the versions that it names.
CHOSEN_BY_TORCH = ("cuda-", "nvidia-", "triton")


def constraints(name: str = "constraints.txt") -> dict[str, str]:
    return read_pins((ROOT / name).read_text().splitlines())


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
    Path("gpu.txt").write_text('# a set\npydantic==0.2\npydantic==0.3; python_version < "3.0"\n')
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


NOWHERE = "http://127.0.0.1:9"  # no index answers here
SET_UP = {"CARD", "CC", "CXX", "GPU", "LOCK", "PYTHON", "TORCH_INDEX"}


def set_up(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in SET_UP and not k.startswith("PIP_")}
    pips = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_COMPILE": "1", "PIP_RETRIES": "0", "XDG_CACHE_HOME": str(project)}
    environment = inherited | pips | {"PYTHON": sys.executable, "PYTORCH": NOWHERE} | variables
    return subprocess.run([project / "setup/install.sh"], env=environment, capture_output=True, text=True, check=False)


Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """The one sentence of a set-up that refuses, in a copy of the project; it printed `said` and made nothing."""
    shutil.copytree(ROOT / "setup", tmp_path / "project" / "setup")

    def run(said: str = "", **variables: str) -> str:
        done = set_up(tmp_path / "project", **variables)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, said, 1)
        assert not (tmp_path / "project" / ".venv").exists()
        return done.stderr

    return run


@pytest.mark.parametrize(
    ("python", "wanted"), [("3.10.4", False), ("3.11.2", True), ("3.12.1", True), ("3.14.0", True), ("3.15.0", False)]
)
@pytest.mark.parametrize("package", [True, False])
def test_setup_supports_the_pythons_of_pyproject_and_names_no_package_that_does_not_exist(
    tmp_path: Path, refusal: Refusal, python: str, wanted: bool, package: bool
):
    version = f"import sys; sys.version_info = ({python.replace('.', ', ')}); $2"
    lacks = 'case "$2" in "import ensurepip, venv" | virtualenv | pip) exit 1 ;; esac'
    script = f'{lacks}\nexec "{sys.executable}" -c "{version}"'
    fake = executable(tmp_path / "python", script)
    name = f"python{python.rpartition('.')[0]}-venv"
    executable(tmp_path / "apt-cache", f'[ "$*" = "show {name}" ] && {str(package).lower()}')
    said = refusal(PYTHON=str(fake), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ("lacks the venv module" if wanted else f"is Python {python.rpartition('.')[0]}") in said
    assert (f"apt install {name}" in said) == (wanted and package)
    assert SpecifierSet(PROJECT["requires-python"]).contains(python) == wanted


def test_setup_without_a_compiler_is_refused(refusal: Refusal):
    assert "no working C and C++ compiler" in refusal(CXX="no-such-compiler")


DF = "echo header\necho tmpfs 9000000 7000000 2000000 78% /"
UNREACHED = (
    f"setup: {NOWHERE}/cpu cannot be reached: torch comes from pip's own index, which may have it with CUDA alone\n"
)


def test_a_compiler_with_a_static_libstdcxx_alone_gives_way_to_the_systems_or_is_refused(
    tmp_path: Path, refusal: Refusal
):
    (tmp_path / "libstdc++.a").touch()
    asked = f"-print-file-name=*.a) echo {tmp_path}/libstdc++.a ;;\n-print-file-name=*) echo libstdc++.so ;;"
    static = executable(tmp_path / "g++", f'case $1 in\n{asked}\n*) exec /usr/bin/c++ "$@" ;;\nesac')
    executable(tmp_path / "df", DF)
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = f"setup: {static} has no shared libstdc++: {shutil.which('c++')} compiles in its place\n"
    assert "13 GB of free disk" in refusal(said + UNREACHED, PATH=path, CXX=str(static))
    (tmp_path / "c++").symlink_to(static)
    assert "has no shared libstdc++, and with a static one" in refusal(PATH=path, CXX=str(static))


@pytest.mark.parametrize(("index", "needed"), [("", "13 GB"), ("x/cpu", "4 GB")])
def test_setup_without_disk_is_refused(tmp_path: Path, refusal: Refusal, index: str, needed: str):
    executable(tmp_path / "df", DF)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert f"{needed} of free disk" in refusal("" if index else UNREACHED, PATH=path, TORCH_INDEX=index)


def card(directory: Path, described: str, nvcc: str = "12.8") -> str:
    """A PATH on which nvidia-smi finds one card and nvcc is of this release."""
    executable(directory / "nvidia-smi", f"[ -z '{described}' ] || echo '{described}'")
    executable(directory / "nvcc", f"echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'")
    return f"{directory}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("described", "nvcc", "message"),
    [
        ("", "12.8", "nvidia-smi finds no card"),
        ("Tesla K80, 3.7, 470.256", "12.8", "compute capability 7.5 (a T4) and newer, and Tesla K80 has 3.7"),
        ("Tesla T4, 7.5, 470.256", "11.4", "CUDA 12 and newer, which needs driver 525, and this is 470.256"),
        ("Tesla T4, 7.5, 550.54", "13.0", "nvcc is of CUDA 13 and driver 550.54 runs no more than CUDA 12"),
        ("Tesla T4, 7.5, 580.1", "13.0", "Python 3.11 to 3.14 is needed"),
        ("Tesla T4, 7.5, 535.1", "12.2", "Python 3.11 to 3.14 is needed"),
    ],
)
def test_a_card_is_checked_before_any_download(
    tmp_path: Path, refusal: Refusal, described: str, nvcc: str, message: str
):
    assert message in refusal(GPU="1", PATH=card(tmp_path, described, nvcc), PYTHON="no-such-python")


def test_an_image_is_set_up_for_a_card_that_is_not_there(tmp_path: Path, refusal: Refusal):
    path = card(tmp_path, "")
    assert "Python 3.11 to 3.14 is needed" in refusal(GPU="1", CARD="T4, 7.5, 570", PATH=path, PYTHON="no-such-python")


@pytest.mark.parametrize(("made", "refused"), [("constraints.txt", True), ("constraints-gpu.txt", False)])
def test_an_environment_for_the_cpu_does_not_become_one_for_a_card(tmp_path: Path, made: str, refused: bool):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "constraints.txt", ".venv/ready"):
        (tmp_path / name).write_text(f"{made}\n")
    for gpu in ("", "1"):
        done = subprocess.run(["make", "setup", f"GPU={gpu}"], cwd=tmp_path, capture_output=True, text=True)
        assert ("made without GPU=1; remove it" in done.stderr) == (done.returncode != 0) == (refused and gpu == "1")


class Index(ThreadingHTTPServer):
    """Package indices at /NAME/: each has any package at the version of `PINS`, made on request, with no content.

    torch's wheel names the CUDA libraries of the index that it comes from, as PyTorch's do. `asked` has what was
    downloaded: index -> packages.
    """

    PINS: ClassVar = {**constraints("constraints-gpu.txt"), "libraries-of-cuda": "1.0"}

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: dict[str, set[str]] = {}

    def wheel(self, index: str, package: str) -> bytes:
        name, version = package.replace("-", "_"), self.PINS[package]
        needs = "Requires-Dist: libraries-of-cuda\n" * (package == "torch" and index != "cpu")
        about = {"METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{needs}"}
        about |= {"WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "RECORD": ""}
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for entry, text in about.items():
                archive.writestr(f"{name}-{version}.dist-info/{entry}", text)
        return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        _, index, package, *file = self.path.split("/")
        found = package in self.server.PINS and not package.startswith("llama")
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        if found and file[0]:
            self.server.asked.setdefault(index, set()).add(package)
            self.wfile.write(self.server.wheel(index, package))
        elif found:
            wheel = f"{package.replace('-', '_')}-{self.server.PINS[package]}-py3-none-any.whl"
            self.wfile.write(f'<a href="{wheel}">{wheel}</a>'.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[Index]:
    server = Index()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose sets of packages are small, with a .venv that has nothing but pip."""
    directory = Path(shutil.copytree(ROOT / "setup", tmp_path / "project/setup")).parent
    pins = [f"{name}=={Index.PINS[name]}" for name in ("pip", "torch", "torchvision", "peft")]
    for name in ("constraints.txt", "constraints-gpu.txt"):
        (directory / name).write_text("\n".join(pins) + "\n")
    extras = f"dependencies = {pins[:1]}\noptional-dependencies = {{train = {pins[1:]}, unsloth = ['unsloth==1']}}"
    (directory / "pyproject.toml").write_text(f"[project]\n{extras}")
    venv.create(directory / ".venv", symlinks=True)
    (site,) = (directory / ".venv/lib").glob("python3*/site-packages")
    for entry in [Path(pip.__file__).parent, *Path(pip.__file__).parent.parent.glob("pip-*.dist-info")]:
        shutil.copytree(entry, site / entry.name)
    return directory


@pytest.mark.parametrize(
    ("described", "build"),
    [
        ("Tesla T4, 7.5, 570.26", "cu128"),
        ("", "cpu"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("Tesla T4, 7.5, 535.104", "cu126"),
                ("Tesla T4, 7.5, 550.54", "cu126"),
                ("Tesla T4, 7.5, 580.65", ""),
                ("not reached", ""),
            )
        ),
    ],
)
def test_torch_alone_comes_from_the_index_that_fits_driver_or_cpu(
    tmp_path: Path, project: Path, index: Index, described: str, build: str
):
    variables = {"GPU": "1", "PATH": card(tmp_path, described)} if "," in described else {}
    if described != "not reached":
        variables["PYTORCH"] = index.url
    done = set_up(project, PIP_INDEX_URL=f"{index.url}/pip", **variables)
    assert "pip download failed" in done.stderr, done.stdout + done.stderr  # all packages are there; llama.cpp is next
    libraries = {"libraries-of-cuda"} if build != "cpu" else set()
    others = {"peft", *libraries}
    torch = {"torch", "torchvision"}
    assert index.asked == ({"pip": others, build: torch} if build else {"pip": others | torch})


def test_a_python_without_venv_takes_virtualenv_from_the_index(tmp_path: Path, project: Path):
    """As on Colab and on a Debian without python3-venv, whose pip may not write into the system."""
    shutil.rmtree(project / ".venv")
    answers = {
        "-c import?ensurepip*": "exit 1",
        "-m pip?install?--target*": "exit 0",
        "-m virtualenv?--version": '[ -n "$PYTHONPATH" ]',
        "-m virtualenv*": f'exec {sys.executable} -m venv --without-pip "$3"',
        "*": f'exec {sys.executable} "$@"',
    }
    cases = "\n".join(f"{pattern.replace(' ', '?')}) {answer} ;;" for pattern, answer in answers.items())
    asked = f'echo "$*" >>{tmp_path}/asked\ncase "$*" in\n{cases}\nesac'
    done = set_up(project, PYTHON=str(executable(tmp_path / "python", asked)), PIP_INDEX_URL=NOWHERE)
    assert "pip install failed" in done.stderr, done.stdout + done.stderr
    lines = (tmp_path / "asked").read_text().splitlines()
    assert f"-m pip install --target {project}/.venv.partial virtualenv=={constraints()['virtualenv']}" in lines
    assert lines[-1] == f"-m virtualenv {project}/.venv"
    assert not (project / ".venv.partial").exists()
