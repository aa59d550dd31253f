"""The micro run's models, loaded once by each pytest worker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.scoring.scorer import Scorer
from pipeline.sections.train import Train
from tests.conftest import yaml
from tests.stages.helpers import TINY_BASE, convert, examples


@pytest.fixture(scope="session")
def wide(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model as a 16-bit GGUF."""
    return convert(micro / "models" / "merged", tmp_path_factory.mktemp("wide") / "wide.gguf")


@pytest.fixture(scope="session")
def shipped(micro: Path) -> Path:
    """The GGUF of the micro run."""
    return micro / "models" / "medical-reasoner.gguf"


@pytest.fixture(scope="session")
def scorer(shipped: Path) -> Iterator[Scorer]:
    """The micro run's GGUF, loaded."""
    with Scorer(shipped, 2048, "") as scorer:
        yield scorer


@pytest.fixture(scope="session")
def trainer(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`train`'s own trainer before its first step, on five examples; the decision has the weight 4."""
    from pipeline.training.lora import quantized_lora
    from pipeline.training.trainer import build_trainer

    section = yaml.load((micro / "params.yaml").read_text())["train"]
    params = Train.model_validate(section | {"decision_weight": 4.0})
    model, tokenizer = quantized_lora(params, micro / TINY_BASE)
    rows = examples(micro)[:5]
    built = build_trainer(params, model, tokenizer, rows, rows[:1], tmp_path_factory.mktemp("trainer"))
    built.model.train()  # otherwise bitsandbytes repacks the weights for a CPU kernel without a gradient
    return built
