"""On a CUDA card: both backends train the tiny base in float16, as a T4 must, on the answers alone, and agree."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import run_command, run_stage, set_params, stages
from tests.stages.helpers import TINY_BASE, examples, numbers, table, tensors

pytestmark = pytest.mark.gpu
BACKENDS = ["trl", "unsloth"]

# A batch as the trainer's data loader gives it, its loss before the first step and the norm of B's gradient. In a
# process of its own, because Unsloth replaces functions of transformers, TRL and PEFT.
BATCH = f"""
import json
from pathlib import Path
import torch
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.core.params import load_params
from pipeline.sections.train import Train
from pipeline.training.lora import check_backend, quantized_lora
from pipeline.training.trainer import build_trainer
params = load_params("train", Train)
check_backend(params)
rows = read_rows(Path("data/formatted/train.jsonl"), Example)[:4]
model, tokenizer = quantized_lora(params, Path("{TINY_BASE}"))
trainer = build_trainer(params, model, tokenizer, rows, rows[:1], Path("work"))
batch = next(iter(trainer.get_train_dataloader()))
trainer.model.train()
with torch.autocast("cuda", torch.float16):
    loss = trainer.compute_loss(trainer.model, dict(batch))
    (1024 * loss).backward()
squares = [float(p.grad.float().norm()) ** 2 for n, p in trainer.model.named_parameters() if "lora_B" in n]
found = {{"ids": batch["input_ids"].tolist(), "labels": batch["labels"].tolist()}}
found |= {{"loss": loss.item(), "gradient": sum(squares) ** 0.5 / 1024}}
Path("batch.json").write_text(json.dumps(found))
"""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "unsloth":
        pytest.importorskip("unsloth", exc_type=ImportError)
    return request.param


def choose(project: Path, backend: str, **changes: Any) -> None:
    """Set the section `train` for a card without bfloat16."""
    settings = {"dtype": "float16", "gradient_checkpointing": True, "optim": "adamw_8bit"}
    set_params(project, "train", backend=backend, **settings | changes)


def test_sixty_steps_in_float16_have_finite_losses_and_ask_no_network(project: Path, watch: Path, backend: str) -> None:
    choose(project, backend, offload_embedding=backend == "unsloth", max_steps=60, learning_rate=5e-3)
    watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(project / "connects")}
    result = run_command(project, stages(project)["train"]["cmd"], **watched)
    assert result.returncode == 0, result.stderr
    assert not (project / "connects").exists(), (project / "connects").read_text()
    metrics = numbers(project / "metrics" / "train.json")
    assert metrics["skipped_steps"] <= 3
    assert metrics["last_loss"] < metrics["first_loss"]
    log = table(project / "metrics" / "train_log.csv")
    assert len(log) == 60
    assert all(math.isfinite(float(row["loss"])) for row in log)
    names = {"adapter_config.json", "adapter_model.safetensors", "trained_on.json", "training.json"}
    assert {path.name for path in (project / "models" / "adapter").iterdir()} == names
    assert numbers(project / "metrics" / "train_resources.json")["peak_vram_reserved_mib"] > 0


def batch(project: Path, backend: str, **changes: Any) -> dict[str, Any]:
    """Ids and labels of the four examples of a batch, the loss of it and the norm of B's gradient."""
    choose(project, backend, per_device_train_batch_size=4, **changes)
    (project / "batch.py").write_text(BATCH)
    paths = os.pathsep.join(filter(None, [str(project), os.environ.get("PYTHONPATH")]))
    done = run_command(project, "python3 batch.py", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    return numbers(project / "batch.json")


def test_the_loss_is_on_the_answer_and_not_on_the_prompt(project: Path, backend: str) -> None:
    """B is 0 at first, so the loss is the base's own, and the same with both backends."""
    found = batch(project, backend)
    answers = [row.input_ids[row.prompt_tokens :] for row in examples(project)[:4]]
    ids, labels = ([value for row in found[name] for value in row] for name in ("ids", "labels"))
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert sorted(label for label in labels if label != -100) == sorted(token for answer in answers for token in answer)
    assert found["loss"] == pytest.approx(batch(project, "trl")["loss"], rel=0.01)


def test_both_backends_weigh_the_decision_alike_and_log_the_loss_without_the_weight(project: Path) -> None:
    pytest.importorskip("unsloth", exc_type=ImportError)
    ratios: list[float] = []
    for backend in BACKENDS:
        plain, weighted = (batch(project, backend, decision_weight=weight) for weight in (1.0, 20.0))
        assert weighted["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        ratios.append(weighted["gradient"] / plain["gradient"])
    assert ratios[0] > 1.5
    assert ratios[1] == pytest.approx(ratios[0], rel=0.15)  # each draws its own A


def test_the_adapters_of_both_backends_agree(project: Path) -> None:
    """After three steps, each from its own random A: losses within 2 %, norms of the updates B A within 25 %."""
    pytest.importorskip("unsloth", exc_type=ImportError)
    losses: list[list[float]] = []
    norms: list[float] = []
    for backend in BACKENDS:
        choose(project, backend, dtype="float32", optim="adamw_torch", warmup_steps=0, learning_rate=1e-3)
        assert run_stage(project, "train").returncode == 0
        losses.append([float(row["loss"]) for row in table(project / "metrics" / "train_log.csv")])
        matrices = tensors(project / "models" / "adapter" / "adapter_model.safetensors")
        pairs = [(matrices[name], matrices[name.replace("lora_B", "lora_A")]) for name in matrices if "lora_B" in name]
        norms.append(sum(float((b @ a).norm()) ** 2 for b, a in pairs) ** 0.5)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert norms[1] == pytest.approx(norms[0], rel=0.25)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_two_cards_train_as_one_whether_visible_or_used(project: Path) -> None:
    """In float32, to 0.1 % of each loss. DataParallel would double the examples and the logged loss."""
    choose(project, "trl", dtype="float32", optim="adamw_torch", gradient_accumulation_steps=2, max_steps=10)
    losses: list[list[float]] = []
    for environment in ({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "0,1"}, {"GPUS": "2"}):
        done = run_command(project, stages(project)["train"]["cmd"], **environment)
        assert done.returncode == 0, done.stderr
        losses.append([float(row["loss"]) for row in table(project / "metrics" / "train_log.csv")])
        used = numbers(project / "metrics" / "train_resources.json")["processes"]
        assert used == int(environment.get("GPUS", 1))
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("layers", [0, 1, 999])
def test_evaluate_with_some_layers_on_the_card(project: Path, layers: int) -> None:
    """As on this machine's CPU: `project` may be a copy of another machine's run, which rounds differently."""
    tables: list[list[dict[str, str]]] = []
    for environment in ({"CUDA_VISIBLE_DEVICES": ""}, {"N_GPU_LAYERS": str(layers)}):
        done = run_command(project, stages(project)["evaluate"]["cmd"], **environment)
        assert done.returncode == 0, done.stderr
        tables.append(table(project / "metrics" / "predictions" / "tuned.csv"))
    before, after = tables
    assert [row["pmid"] for row in after] == [row["pmid"] for row in before]
    assert [float(row["yes"]) for row in after] == pytest.approx([float(row["yes"]) for row in before], abs=0.3)
