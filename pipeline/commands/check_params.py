"""Check params: whether a run can begin here: the project's root, a git clone, and every section of params.yaml valid.

DVC reads params.yaml and git before any stage starts, and its own errors do not say what to do.
"""

from pathlib import Path
from typing import Any

from pipeline.commands.cli import require_clone
from pipeline.core.errors import Fail
from pipeline.core.params import load_params
from pipeline.sections.base import BASE
from pipeline.sections.download import DOWNLOAD
from pipeline.sections.evaluate import Evaluate, Reference
from pipeline.sections.format import Format
from pipeline.sections.generate import Generate
from pipeline.sections.quantize import Quantize
from pipeline.sections.report import Report
from pipeline.sections.train import Train

SECTIONS: dict[str, Any] = {
    "download": DOWNLOAD,
    "base": BASE,
    "format": Format,
    "train": Train,
    "quantize": Quantize,
    "evaluate": Evaluate,
    "reference": Reference,
    "generate": Generate,
    "report": Report,
}


def main() -> None:
    """Fail with every problem that is found."""
    require_clone()
    if not Path("params.yaml").is_file():
        raise Fail("params.yaml is missing; take a profile (`cp profiles/tiny.yaml params.yaml`)")
    problems: list[str] = []
    for name, model in SECTIONS.items():
        try:
            load_params(name, model)
        except Fail as problem:
            if str(problem) not in problems:  # a file that is not YAML has one for all sections
                problems.append(str(problem))
    if problems:
        raise Fail("; ".join(problems))
