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
from pipeline.sections.pretrain import PRETRAIN, Pretrain
from pipeline.sections.quantize import Quantize
from pipeline.sections.report import Report
from pipeline.sections.train import Train

SECTIONS: dict[str, Any] = {
    "download": DOWNLOAD,
    "base": BASE,
    "format": Format,
    "pretrain": PRETRAIN,
    "train": Train,
    "quantize": Quantize,
    "evaluate": Evaluate,
    "reference": Reference,
    "generate": Generate,
    "report": Report,
}
ONE_ADAPTER = ("r", "lora_alpha", "target_modules")  # of both phases: `train` would refuse it after the first


def main() -> None:
    """Fail with every problem that is found."""
    require_clone()
    if not Path("params.yaml").is_file():
        raise Fail("params.yaml is missing; take a profile (`cp profiles/tiny.yaml params.yaml`)")
    problems: list[str] = []
    found: dict[str, Any] = {}
    for name, model in SECTIONS.items():
        try:
            found[name] = load_params(name, model)
        except Fail as problem:
            if str(problem) not in problems:  # a file that is not YAML has one for all sections
                problems.append(str(problem))
    match found:
        case {"pretrain": Pretrain() as first, "train": Train() as second}:
            names = [name for name in ONE_ADAPTER if getattr(first, name) != getattr(second, name)]
            problems += [f"params.yaml: train.{name} must equal pretrain.{name}" for name in names]
        case _:
            pass
    if problems:
        raise Fail("; ".join(problems))
