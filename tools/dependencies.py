"""The modules that each stage imports, which dvc.yaml lists as its dependencies.

`python -m tools.dependencies` writes them into dvc.yaml; tests/test_dvc_yaml.py checks that they are there.
"""

import ast
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
CODE = ("pipeline/", ".dvc/plots/")  # dependencies that are no stage's output
# Its process fails or prints a directory whose files have the hashes of models/base/manifest.json, nothing else.
# The launcher, which training processes are started with, changes no result either.
CHECKED = {"pipeline.models.weights", "pipeline.run"}
# What a module reads from beside it.
PLOTS = [f".dvc/plots/{name}.json" for name in "accuracy confusion loss reliability right_label risk_coverage".split()]
BESIDE = {
    "pipeline/reporting/plots.py": PLOTS,
    "pipeline/reporting/release.py": ["pipeline/reporting/templates/release"],
    "pipeline/simulated/trials.py": ["pipeline/simulated/wordings.yaml"],
    "pipeline/stages/base.py": ["pipeline/simulated/tiny_base"],
}


@cache
def source(module: str) -> Path | None:
    """The file of a module of `pipeline`; None for a package, whose __init__.py has a docstring only."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return path if module.startswith("pipeline.") and module not in CHECKED and path.is_file() else None


@cache
def imports(path: Path) -> set[str]:
    """Names of all that a file imports, in functions too, and of the modules that it runs by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(parent), names=names, level=0):
                found |= {parent, *(f"{parent}.{alias.name}" for alias in names)}
            case ast.ImportFrom():
                raise ValueError(f"{path}: relative imports are not followed")
            case ast.Constant(value=str(text)) if re.fullmatch(r"pipeline(\.\w+)+", text):
                found.add(text)
            case _:
                pass
    return found


def closure(module: str) -> set[str]:
    """`module` and every module of `pipeline` that it imports, directly or not."""
    todo, seen = {module}, set[str]()
    while todo:
        name = todo.pop()
        path = source(name)
        assert path, name
        seen.add(name)
        todo |= {found for found in imports(path) if source(found)} - seen
    return seen


def dependencies(stage: str) -> list[str]:
    """The files of the stage's code, and what that code reads from beside it; sorted."""
    found = {str(path.relative_to(ROOT)) for name in closure(f"pipeline.stages.{stage}") if (path := source(name))}
    return sorted(found | {path for module, paths in BESIDE.items() if module in found for path in paths})


def main() -> None:
    """Write the dependencies into dvc.yaml, keeping its comments."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=2, offset=0)
    path = ROOT / "dvc.yaml"
    described: Any = yaml.load(path)
    for stage, about in described["stages"].items():
        data = [dep for dep in about.get("deps", []) if not dep.startswith(CODE)]
        about["deps"] = sorted([*data, *dependencies(stage)])
    text = io.StringIO()
    yaml.dump(described, text)
    path.write_text("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()), encoding="utf-8")


if __name__ == "__main__":
    main()
