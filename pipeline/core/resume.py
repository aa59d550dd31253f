"""The key under which a killed stage finds what it had written."""

import hashlib
import json
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.core.files import sha256

CHECKPOINTS = Path(".checkpoints")  # not an output of a stage: DVC removes outputs before a run


def run_key(params: dict[str, Any], inputs: list[Path], extras: list[str], device: str) -> str:
    """A hash of what determines a run: parameters, inputs, loaded code, packages of the `extras`, and device."""
    code = {str(module.__file__) for name, module in sys.modules.items() if name.startswith("pipeline.")}
    about = {
        "params": params,
        "inputs": [sha256(path) for path in inputs],
        "code": sorted(sha256(Path(path)) for path in code if path != "None"),
        "packages": installed(extras),
        "device": device,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def installed(extras: list[str]) -> dict[str, str]:
    """Package -> installed version of the packages in `extras`, those that are not installed left out."""
    pins = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    names = {pin.partition("==")[0] for extra in extras for pin in pins[extra]}
    return {name: one.version.partition("+")[0] for name in names for one in distributions(name=name)}
