"""The seam between training backends: what is refused in a sentence, and what a step is counted as."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from pipeline.core.stage import Fail
from pipeline.stages.train import Params, check_backend, step_recorder, unsloth_lora
from tests.conftest import ROOT


def params(profile: str, **changes: object) -> Params:
    values = YAML(typ="safe").load((ROOT / "profiles" / f"{profile}.yaml").read_text())["train"]
    return Params.check("train", values | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no card")
def test_unsloth_without_a_card():
    with pytest.raises(Fail, match=r"train\.backend: unsloth needs a CUDA card, and torch finds none; set it to trl"):
        check_backend(params("llama3-8b-t4"))


def test_unsloth_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "anywhere")
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(Fail, match=r"unsloth is not installed whole .*make setup GPU=1"):
        check_backend(params("llama3-8b-t4"))


def test_unsloth_gets_a_path_that_it_cannot_take_for_a_repository_and_is_to_ask_nobody(monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> tuple[Any, Any]:
        given.update(options, name=name)
        return None, None

    model = SimpleNamespace(from_pretrained=from_pretrained, get_peft_model=lambda model, **options: model)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=model))
    unsloth_lora(params("llama3-8b-t4"), Path("models/base"), torch.float16, None, {})
    assert given["name"] == str(Path.cwd() / "models" / "base")
    assert (given["local_files_only"], given["trust_remote_code"]) == (True, False)


def test_trl_cannot_offload_the_embedding():
    with pytest.raises(Fail, match=r"train\.offload_embedding"):
        check_backend(params("micro", offload_embedding=True))
    check_backend(params("micro"))


def test_an_unknown_backend():
    with pytest.raises(Fail, match=r"train\.backend"):
        params("micro", backend="axolotl")


@pytest.mark.parametrize("profile", ["llama3-8b-t4", "llama3-8b"])
def test_the_profiles_of_the_8b_model(profile: str):
    chosen = params(profile)
    assert (chosen.r, chosen.lora_alpha, chosen.max_steps) == (16, 16, 60)
    assert chosen.per_device_train_batch_size * chosen.gradient_accumulation_steps == 8
    assert chosen.dtype == {"llama3-8b-t4": "float16", "llama3-8b": "bfloat16"}[profile]


def test_steps_that_the_loss_scaling_leaves_out_are_counted():
    recorder, state = step_recorder(), SimpleNamespace(log_history=[])
    recorder.on_train_begin(None, state, None)
    for step, skipped in enumerate([True, True, False], 1):
        state.log_history.append({"step": step})
        recorder.on_log(None, state, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
    assert [(row["step"], row["skipped"]) for row in state.log_history] == [(1, True), (2, True), (3, False)]
    assert all(row["seconds"] >= 0 and row["rss_mib"] > 0 for row in state.log_history)
