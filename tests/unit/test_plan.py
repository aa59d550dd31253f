"""`python -m pipeline plan`: what it says of a profile, with the hub and without, and what to change."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.plan import SHAPE
from benchmarks.rehearsal import CONFIG
from pipeline.commands import plan
from pipeline.commands.cli import run_command
from pipeline.core.errors import Fail
from pipeline.models.memory import GIB, MIB, training_vram
from pipeline.sections.pretrain import Pretrain
from pipeline.sections.train import Train
from tests.conftest import ROOT, set_params, yaml
from tests.hub import COMMIT, serve

PROFILES = ("llama3-8b-t4", "llama3-8b")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the T4 profile for one file, on a machine without a card and without a hub."""
    from huggingface_hub import constants

    shutil.copyfile(ROOT / "profiles" / "llama3-8b-t4.yaml", tmp_path / "params.yaml")
    set_params(tmp_path, "quantize", quant_types=["Q4_K_M"])
    (tmp_path / "llama.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "this_card", lambda: None)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], config: str | None = "llama.json") -> str:
    plan.main(Path(config) if config else None)
    return capsys.readouterr().out


def unreachable(*arguments: Any, **options: Any) -> Any:
    raise Fail("m/m could not be fetched; check the network, then run `dvc repro`")


def test_offline_it_computes_sizes_from_a_given_configuration_and_says_so(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "from_hub", unreachable)
    text = said(capsys)
    assert "shapes from llama.json\nThe hub gave no sizes, so they are computed: m/m could not" in text
    assert "Weights to fetch: 16.1 GB" in text
    assert "Q4_K_M *     4,918      4,606  24 of 33     whole" in text
    assert "no CUDA card was found" in text
    assert "card of 4 GB: the largest type that it holds whole is IQ3_XS" in text
    with pytest.raises(Fail, match=r"check the network; or give .* --config FILE"):
        plan.main(None)


def test_the_hub_says_what_is_to_be_fetched_and_its_configuration_is_kept_for_later(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    set_params(project, "base", repo_id="o/m", revision=COMMIT)
    weights = {f"model-{part}.safetensors": bytes(30_000_000) for part in "12"} | {
        "original/model.safetensors": bytes(9)
    }
    with serve() as server:
        server.add_repository("o/m", {"config.json": json.dumps(CONFIG).encode(), **weights})
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        text = said(capsys, None)
        assert not any("safetensors" in path for path in server.requests)
    assert "shapes from the hub\nWeights to fetch: 0.1 GB" in text
    monkeypatch.setattr(plan, "from_hub", unreachable)
    assert "shapes from the hub's cache\nThe hub gave no sizes" in said(capsys, None)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("memory", [6, 8, 16, 24])
def test_the_changes_of_train_fit_and_keep_the_batch(profile: str, memory: int):
    params = Train(**yaml.load(ROOT / "profiles" / f"{profile}.yaml")["train"])
    changes = plan.smaller(SHAPE, params, memory * GIB)
    assert changes is not None
    changed = Train(**{**params.model_dump(), **changes})
    assert training_vram(SHAPE, changed, params.max_length) <= memory * GIB
    batches = [row.per_device_train_batch_size * row.gradient_accumulation_steps for row in (params, changed)]
    assert batches[0] == batches[1]
    assert bool(changes) == (training_vram(SHAPE, params, params.max_length) > memory * GIB)
    assert plan.smaller(SHAPE, params, 2 * GIB) is None


def test_a_small_card_and_a_small_disk_get_advice(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "from_hub", unreachable)
    monkeypatch.setattr(plan, "this_card", lambda: plan.Card("Small", 4 * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000_000))
    text = said(capsys)
    assert "This machine: Small, 4,096 MiB" in text
    assert "disk: quantize needs 53.3 GB and 20.0 GB are free; free some or set HF_HOME" in text
    assert "Small: training does not fit" in text
    assert "Small: evaluate needs N_GPU_LAYERS=23" in text


def test_the_first_phase_counts_where_it_needs_more(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "from_hub", unreachable)
    shutil.copyfile(ROOT / "profiles" / "llama3-8b-pqa-a.yaml", "params.yaml")
    set_params(project, "train", per_device_train_batch_size=1, gradient_checkpointing=True)
    first = Pretrain(**yaml.load(project / "params.yaml")["pretrain"])
    text = said(capsys)
    assert f"{training_vram(SHAPE, first, first.max_length) / MIB:,.0f}" in text
    assert "\npretrain " in text
    assert "card of 8 GB: training fits with pretrain.per_device_train_batch_size: 8, pretrain.grad" in text


def test_a_configuration_that_does_not_exist_is_named(project: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run_command("plan", plan.main, ["--config", "none.json"])
    assert "'none.json' does not exist" in capsys.readouterr().err


def test_the_default_fits(project: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copyfile(ROOT / "profiles" / "tiny.yaml", "params.yaml")
    text = said(capsys, None)
    assert "Weights to fetch: none" in text
    assert text.endswith("Everything fits.\n")
