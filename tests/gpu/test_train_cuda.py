"""On a CUDA card: both backends train the tiny base in float16, as a T4 must, and save the same kind of adapter."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_command, run_stage, set_params, stages

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["trl", "unsloth"])
def test_sixty_steps_in_float16(project: Path, watch: Path, backend: str):
    if backend == "unsloth":
        pytest.importorskip("unsloth", exc_type=ImportError)
    set_params(project, "train", backend=backend, offload_embedding=backend == "unsloth", dtype="float16", max_steps=60)
    set_params(project, "train", learning_rate=5e-3, gradient_checkpointing=True, optim="adamw_8bit")
    shutil.rmtree(project / "models" / "adapter")
    watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(project / "connects")}
    result = run_command(project, stages(project)["train"]["cmd"], **watched)
    assert result.returncode == 0, result.stderr
    assert not (project / "connects").exists(), (project / "connects").read_text()
    metrics = json.loads((project / "metrics" / "train.json").read_text())
    assert metrics["skipped_steps"] <= 3
    assert metrics["last_loss"] < metrics["first_loss"]
    names = {path.name for path in (project / "models" / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "trained_on.json"}
    resources = json.loads((project / "metrics" / "train_resources.json").read_text())
    assert resources["peak_vram_reserved_mib"] > 0


@pytest.mark.parametrize("layers", [0, 1, 999])
def test_evaluate_with_some_layers_on_the_card(project: Path, layers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("N_GPU_LAYERS", str(layers))
    before = (project / "metrics" / "predictions" / "tuned.csv").read_text().splitlines()
    assert run_stage(project, "evaluate").returncode == 0
    after = (project / "metrics" / "predictions" / "tuned.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in after] == [line.split(",")[:2] for line in before]
