"""Pretrain: artificial questions and a base -> an adapter from which `train` starts, or a directory that says none.

The first of two phases: the same training as `train`, with parameters of its own.
"""

from pathlib import Path

from pipeline.core.outputs import write_csv, write_json, writing
from pipeline.core.params import load_params
from pipeline.core.usage import Usage
from pipeline.sections.pretrain import PRETRAIN, NoPretraining
from pipeline.training.fit import LOG, MEMORY_LOG, fit


def main(
    examples: Path,
    validation: Path,
    base: Path,
    adapter: Path,
    metrics: Path,
    log: Path,
    memory_log: Path,
    resources: Path,
) -> None:
    """Write ADAPTER; METRICS, LOG and MEMORY_LOG with a row a step; RESOURCES. All are empty without a first phase."""
    params, usage = load_params("pretrain", PRETRAIN), Usage()
    if not isinstance(params, NoPretraining):
        return fit(params, None, examples, validation, base, adapter, metrics, log, memory_log, resources)
    with writing(adapter) as partial:
        partial.mkdir()
        write_json(partial / "none.json", params.model_dump())
    write_json(metrics, {"skipped_steps": 0})
    write_csv(log, LOG, [])
    write_csv(memory_log, MEMORY_LOG, [])
    write_json(resources, usage.figures())
