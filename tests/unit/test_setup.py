"""The environment is what pyproject.toml and constraints.txt say, and set-up refuses what it cannot do."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# torch's CUDA build brings these, at the versions that it names.
CHOSEN_BY_TORCH = ("cuda-", "nvidia-", "triton")


def constraints(name: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def installed() -> dict[str, str]:
    """Every package in this environment, without torch's local tag ('+cpu')."""
    here = [d for d in distributions() if Path(str(d.locate_file(""))).is_relative_to(sys.prefix)]
    return {canonicalize_name(d.name): Version(d.version).public for d in here}


@pytest.mark.parametrize("group", ["dependencies", *PROJECT["optional-dependencies"]])
def test_pins_of_pyproject_are_exact_and_those_of_constraints(group: str) -> None:
    pins = [Requirement(pin) for pin in PROJECT["optional-dependencies"].get(group, PROJECT["dependencies"])]
    pinned = constraints("constraints-gpu.txt" if group == "unsloth" else "constraints.txt")
    expected = {pin.name: f"=={pinned.get(canonicalize_name(pin.name))}" for pin in pins}
    assert {pin.name: str(pin.specifier) for pin in pins} == expected


def test_constraints_cover_everything_installed() -> None:
    here, pinned = installed(), constraints()
    names = {name for name in here.keys() | pinned.keys() if not name.startswith(CHOSEN_BY_TORCH)}
    differ = {name: (here.get(name), pinned.get(name)) for name in names if here.get(name) != pinned.get(name)}
    assert differ == {}, "(installed, in constraints.txt): `make setup`, or `make constraints` after a change of pins"


def test_this_python_is_a_supported_one() -> None:
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


@pytest.mark.parametrize(
    ("python", "wanted"),
    [("3.10.4", False), ("3.11.2", True), ("3.12.1", True), ("3.14.0", True), ("3.15.0", False)],
)
def test_setup_supports_the_pythons_of_pyproject(tmp_path: Path, python: str, wanted: bool) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/sh
if [ "$2" = "import ensurepip, venv" ]; then exit 1; fi
exec "{sys.executable}" -c "import sys; sys.version_info = ({python.replace(".", ", ")}); $2"
"""
    )
    fake.chmod(0o755)
    message = "lacks the venv module" if wanted else f"is Python {python.rpartition('.')[0]}"
    assert message in refusal(tmp_path, PYTHON=str(fake))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python) == wanted


def test_setup_without_a_compiler(tmp_path: Path) -> None:
    assert "no working C and C++ compiler" in refusal(tmp_path, CXX="no-such-compiler")


def test_setup_with_a_static_libstdcxx_alone(tmp_path: Path) -> None:
    """A compiler that would give llama.cpp a libstdc++ of its own gives way to the system's; alone, it is refused."""
    (tmp_path / "libstdc++.a").touch()
    static = tmp_path / "g++"
    static.write_text(
        f"""#!/bin/sh
case $1 in
-print-file-name=*.a) echo {tmp_path}/libstdc++.a ;;
-print-file-name=*) echo libstdc++.so ;;
*) exec /usr/bin/c++ "$@" ;;
esac
"""
    )
    static.chmod(0o755)
    (tmp_path / "df").write_text("#!/bin/sh\necho header\necho tmpfs 9000000 7000000 2000000 78% /\n")
    (tmp_path / "df").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = f"setup: {static} has no shared libstdc++: {shutil.which('c++')} compiles in its place\n"
    assert "13 GB of free disk" in refusal(tmp_path, said, PATH=path, CXX=str(static))
    (tmp_path / "c++").symlink_to(static)
    assert "has no shared libstdc++, and with a static one" in refusal(tmp_path, PATH=path, CXX=str(static))


def test_setup_without_disk(tmp_path: Path) -> None:
    df = tmp_path / "df"
    df.write_text("#!/bin/sh\necho header\necho tmpfs 9000000 7000000 2000000 78% /\n")
    df.chmod(0o755)
    message = refusal(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "13 GB of free disk are needed" in message
    assert "there are 2;" in message
    assert "4 GB of free disk" in refusal(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", TORCH_INDEX="x/cpu")


def refusal(tmp_path: Path, said: str = "", **variables: str) -> str:
    """The one sentence of a set-up that refuses, in a copy of the project, having said `said` and made nothing."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "setup", project / "setup", dirs_exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in {"CC", "CXX", "GPU", "PYTHON", "TORCH_INDEX"}}
    command = [project / "setup" / "install.sh"]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == said
    assert len(done.stderr.splitlines()) == 1
    assert not (project / ".venv").exists()
    return done.stderr


CARDS = {
    "": "nvidia-smi finds no card",
    "Tesla K80, 3.7, 470.256": "compute capability 7.5 (a T4) and newer, and Tesla K80 has 3.7",
    "Tesla T4, 7.5, 550.54": "needs driver 580 or newer, and this is 550.54",
    "Tesla T4, 7.5, 580.1": "Python 3.12 to 3.14 is needed",
}


@pytest.mark.parametrize("card", CARDS)
def test_setup_on_a_card_checks_it_before_any_download(tmp_path: Path, card: str) -> None:
    for name in ("nvidia-smi", "nvcc"):
        (tmp_path / name).write_text(f"#!/bin/sh\n[ -z '{card}' ] || echo '{card}'\n")
        (tmp_path / name).chmod(0o755)
    message = refusal(tmp_path, GPU="1", PATH=f"{tmp_path}:{os.defpath}", PYTHON="no-such-python")
    assert CARDS[card] in message


def test_constraints_gpu_covers_what_a_card_runs() -> None:
    """The stages, an S3 remote and what compiles llama.cpp: the set is installed as it is, and nothing beside it."""
    extras = PROJECT["optional-dependencies"]
    groups = [extras[name] for name in extras.keys() - {"server", "test", "dev"}]
    pins = {pin for group in [PROJECT["dependencies"], *groups] for pin in group}
    names = {canonicalize_name(Requirement(pin).name) for pin in pins}
    assert {"pytest", "xformers", *names} - constraints("constraints-gpu.txt").keys() == set()
