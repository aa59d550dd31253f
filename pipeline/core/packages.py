"""Whether the packages that a stage tracks are installed at their pinned versions.

Only the launcher imports this: it refuses to run a stage, but cannot change a result.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from pipeline.core.errors import Fail

CPU_SET = "constraints.txt"
EXTRAS = "project.optional-dependencies."


def check_packages(stage: str, environment: Path) -> None:
    """Raise `Fail` if a package that `stage` tracks has another version than its pin.

    Set-up wrote into `environment`/ready which set of versions it installed; an environment that it did not make is not
    checked. The CPU set has the versions of pyproject.toml, the GPU set its own.
    """
    ready = environment / "ready"
    if not ready.is_file():
        return
    constraints = ready.read_text(encoding="utf-8").strip() or CPU_SET
    pins = tracked_pins(stage)
    if constraints != CPU_SET:
        gpu_set = read_pins(Path(constraints).read_text("utf-8").splitlines())
        pins = {name: gpu_set.get(name, pin) for name, pin in pins.items()}
    found = {name: installed(name) for name in sorted(pins)}
    wrong = [f"{name} is {found[name]}, pinned {pin}" for name, pin in pins.items() if found[name] not in (None, pin)]
    if wrong:
        gpu = " GPU=1" * (constraints != CPU_SET)
        raise Fail(f"packages differ from {constraints}: {'; '.join(wrong)}; run `rm .venv/ready && make setup{gpu}`")


def tracked_pins(stage: str) -> dict[str, str]:
    """Package -> version, of the extras of pyproject.toml that dvc.yaml lists for the stage."""
    described: Any = YAML(typ="safe").load(Path("dvc.yaml"))  # pyright: ignore[reportUnknownMemberType]
    entries = [entry for entry in described["stages"][stage]["params"] if isinstance(entry, dict)]
    extras = [name.removeprefix(EXTRAS) for entry in entries for name in entry["pyproject.toml"]]
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    return read_pins([pin for extra in extras for pin in project["optional-dependencies"][extra]])


def read_pins(lines: list[str]) -> dict[str, str]:
    """Package -> version of lines such as `torch==2.13.0`, without those of another Python or without a version."""
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    here = [one for one in found if one.marker is None or one.marker.evaluate()]
    pins = {canonicalize_name(one.name): str(one.specifier).partition("==") for one in here}
    return {
        name: version.partition("+")[0] for name, (before, pinned, version) in pins.items() if pinned and not before
    }


def installed(name: str) -> str | None:
    """The installed version without a local label such as +cpu; None if the package is not installed."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None
