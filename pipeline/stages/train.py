"""Train: examples and a base -> a LoRA adapter."""

from pathlib import Path

from pipeline.core.params import load_params
from pipeline.sections.train import Train
from pipeline.training.fit import fit


def main(
    train: Path,
    validation: Path,
    base: Path,
    adapter: Path,
    metrics: Path,
    log: Path,
    memory_log: Path,
    resources: Path,
) -> None:
    """Write ADAPTER; METRICS, LOG and MEMORY_LOG with a row a step; RESOURCES."""
    fit(load_params("train", Train), train, validation, base, adapter, metrics, log, memory_log, resources)
