"""What SmolLM2's cross-validation trains: configurations, folds of the non-test questions, and the plan."""

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core.dataset import read_dataset
from pipeline.core.example import Example
from pipeline.core.labels import LABELS
from pipeline.core.question import Question
from pipeline.models.chat import control_tokens, read_template
from pipeline.models.encoder import Encoder
from pipeline.scoring.examples import as_example, without_control_tokens
from pipeline.scoring.protocols import as_question
from pipeline.sections.train import Train

HERE = Path(__file__).parent
PROFILE: dict[str, Any] = YAML(typ="safe").load(HERE.parent / "profiles/smollm2-135m.yaml")

FOLDS = 5
SEEDS = (1, 2, 3)  # of the division into folds and of the training


@dataclass(frozen=True)
class Config:
    """What is compared. `decision` is the weight of the answer's first token, the others have `conclusion`."""

    learning_rate: float = 1e-3
    epochs: int = 3
    r: int = 16
    lora_alpha: int = 16
    batch: int = 8
    lora_dropout: float = 0.0  # `Study.train` has none
    decision: float = 1.0
    conclusion: float = 1.0
    balanced: bool = False  # an example's weight is the inverse of its label's frequency
    tf32: bool = True  # matrix products in TF32 (10 bits of mantissa); `train` itself computes in float32


@dataclass(frozen=True)
class Job:
    config: Config
    seed: int
    fold: int


def read_questions(data: Path, model: Path) -> tuple[list[Example], list[Question]]:
    """The non-test questions as `format` writes examples and questions, by PMID."""
    files = data / "ori_pqal.json", data / "test_ground_truth.json"
    dataset = read_dataset(*files, *(file.name for file in files))
    control, template, encoder = control_tokens(model), read_template(model), Encoder(model)
    kept = sorted(dataset.records.keys() - dataset.test)
    records = {pmid: without_control_tokens(dataset.records[pmid], control) for pmid in kept}
    system = PROFILE["format"]["system_prompt"]
    examples = [as_example(pmid, record, system, template, encoder) for pmid, record in records.items()]
    return examples, [as_question(pmid, record, system) for pmid, record in records.items()]


def split(examples: list[Example], seed: int) -> list[list[Example]]:
    """The examples in `FOLDS` parts with the same share of each label, as near as can be."""
    rng = random.Random(seed)
    dealt: list[Example] = []
    for label in LABELS:
        of_label = [example for example in examples if example.label == label]
        rng.shuffle(of_label)
        dealt += of_label
    return [dealt[fold::FOLDS] for fold in range(FOLDS)]


def parameters(config: Config, seed: int, examples: int) -> Train:
    """The profile's section `train` with this configuration."""
    changes = {key: value for key, value in asdict(config).items() if key in PROFILE["train"]}
    changes |= {"seed": seed, "per_device_train_batch_size": config.batch, "decision_weight": config.decision}
    changes["max_steps"] = config.epochs * -(-examples // config.batch)
    return Train.model_validate(PROFILE["train"] | changes)


def plan() -> list[list[Job]]:
    """Groups of jobs, the most wanted first; those of a group have epochs, rank, alpha and batch in common."""
    plain = Config(learning_rate=2e-3, epochs=4)
    best = replace(plain, decision=3.0)
    wide = replace(best, r=64, lora_alpha=64)
    pairs = [
        ((plain, 1), (best, 1)),
        ((replace(plain, decision=10.0), 1), (replace(plain, learning_rate=4e-3), 1)),
        ((plain, 2), (best, 2)),
        ((replace(wide, decision=1.0), 1), (replace(wide, decision=1.0, learning_rate=1e-3), 1)),
        ((replace(best, epochs=8), 1), (replace(best, epochs=8, learning_rate=1e-3), 1)),
        ((replace(best, learning_rate=4e-3), 1), (replace(best, learning_rate=4e-3), 2)),
        ((wide, 1), (wide, 2)),
        ((plain, 3), (best, 3)),
        ((replace(best, learning_rate=1e-3), 1), (replace(best, learning_rate=1e-3), 2)),
        ((replace(plain, decision=10.0), 2), (replace(plain, decision=10.0), 3)),
        ((replace(best, epochs=2), 1), (replace(best, epochs=2), 2)),
        ((replace(best, epochs=6), 1), (replace(best, epochs=6), 2)),
        ((replace(plain, conclusion=0.0), 1), (replace(best, balanced=True), 1)),
        ((replace(wide, learning_rate=1e-3), 1), (replace(wide, learning_rate=1e-3), 2)),
        ((replace(best, batch=16), 1), (replace(best, batch=16, learning_rate=4e-3), 1)),
        ((replace(best, tf32=False), 1), (replace(best, tf32=False), 2)),
    ]
    return [[Job(config, seed, fold) for config, seed in pair for fold in range(FOLDS)] for pair in pairs]
