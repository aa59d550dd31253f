"""Train: examples and a base, or the adapter of `pretrain` on it -> a LoRA adapter."""

from pathlib import Path

from pipeline.core.params import load_params
from pipeline.models.manifest import ADAPTER
from pipeline.sections.train import Train
from pipeline.training.fit import fit


def main(
    train: Path,
    validation: Path,
    base: Path,
    pretrained: Path,
    adapter: Path,
    metrics: Path,
    log: Path,
    memory_log: Path,
    resources: Path,
) -> None:
    """Write ADAPTER; METRICS, LOG and MEMORY_LOG with a row a step; RESOURCES."""
    start = pretrained if (pretrained / ADAPTER).is_file() else None
    fit(load_params("train", Train), start, train, validation, base, adapter, metrics, log, memory_log, resources)
