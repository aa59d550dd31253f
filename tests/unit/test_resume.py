"""The key of a run changes with each thing that determines its result, and with nothing else."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline.core import resume
from pipeline.core.resume import installed, run_key
from tests.conftest import ROOT

PINS = "project.optional-dependencies = {train = ['torch==2.1', 'absent==3'], report = ['scipy==1']}"
Packages = dict[str, str]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    """What is installed; an input file, pins and a module of the pipeline are in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("input", "one"), ("module.py", ""), ("pyproject.toml", PINS)):
        Path(name).write_text(text)
    module = ModuleType("pipeline.made_up")
    module.__file__ = "module.py"
    monkeypatch.setitem(sys.modules, "pipeline.made_up", module)
    found = {"torch": "2.1", "scipy": "1.0"}
    listed: Any = lambda name: [SimpleNamespace(version=found[name])] if name in found else []  # noqa: E731
    monkeypatch.setattr(resume, "distributions", listed)
    return found


def key(r: int = 16, device: str = "cpu") -> str:
    return run_key({"r": r, "optim": "adamw"}, [Path("input")], ["train"], device)


@pytest.mark.parametrize(
    ("change", "changes_the_result"),
    [
        (lambda packages: Path("input").write_text("two"), True),
        (lambda packages: Path("module.py").write_text("import this"), True),
        (lambda packages: packages.update(torch="2.2"), True),
        (lambda packages: packages.pop("torch"), True),
        (lambda packages: packages.update(dvc_gs="1.0"), False),
        (lambda packages: packages.update(scipy="2.0"), False),
        (lambda packages: Path("other.txt").write_text("beside"), False),
        (lambda packages: None, False),
    ],
    ids="input code package missing another-package another-stage another-file nothing".split(),
)
def test_what_determines_a_run_changes_its_key_and_nothing_else_does(
    packages: Packages, change: Callable[[Packages], Any], changes_the_result: bool
):
    before = key()
    change(packages)
    assert (key() != before) == changes_the_result


@pytest.mark.usefixtures("packages")
def test_parameters_and_device_change_the_key():
    assert len({key(), key(r=8), key(device="cuda")}) == 3


def test_every_tracked_package_is_found_under_the_name_of_its_pin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    names = {name.lower().replace("_", "-") for name in installed(["train", "evaluate", "quantize"])}
    assert {"torch", "transformers", "llama-cpp-python", "trl", "jinja2", "bitsandbytes"} <= names
