"""How many cards train: one unless GPUS asks for more, and then the examples of a step stay the same."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import Fail
from pipeline.run import show_cards
from pipeline.sections.train import Train
from pipeline.training.processes import LAUNCHER, asked_for, check_cards
from pipeline.training.trainer import arguments
from tests.unit.test_params import MICRO


def params(**changes: Any) -> Train:
    return Train.model_validate(MICRO["train"] | changes)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that sees two cards, on a machine that may have none."""
    import trl.trainer.sft_config  # noqa: F401  # first: what it imports asks the real torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def examples_per_step(config: Any, processes: int = 1) -> int:
    """As transformers counts them: train_batch_size is that of all the cards of a process."""
    return config.train_batch_size * config.gradient_accumulation_steps * processes


@pytest.mark.usefixtures("two_cards")
def test_two_visible_cards_do_not_double_the_examples_of_a_step(tmp_path: Path):
    config = arguments(params(per_device_train_batch_size=3, gradient_accumulation_steps=4), tmp_path)
    assert (config.n_gpu, examples_per_step(config)) == (1, 12)


@pytest.mark.parametrize(
    ("visible", "gpus", "shown"),
    [
        (None, None, "0"),
        (None, "1", "0"),
        (None, "4", "0,1,2,3"),
        ("3,1", None, "3"),
        ("3,1", "2", "3,1"),
        ("GPU-8a5f,GPU-77c0,MIG-1", None, "GPU-8a5f"),
        ("GPU-8a5f,GPU-77c0,MIG-1", "2", "GPU-8a5f,GPU-77c0"),
        ("", None, ""),
        ("-1", None, "-1"),
        (None, "many", "0"),
    ],
)
def test_torch_sees_the_first_of_the_cards_that_the_user_shows(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: str | None, shown: str
):
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "GPUS": gpus}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a cluster's job
    show_cards()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "²", "9" * 5000])
def test_gpus_is_a_number_of_cards(monkeypatch: pytest.MonkeyPatch, value: str):
    for good, number in (("", 1), ("1", 1), ("4", 4)):
        monkeypatch.setenv("GPUS", good)
        assert asked_for() == number
    monkeypatch.setenv("GPUS", value)
    with pytest.raises(Fail, match="GPUS"):
        asked_for()


@pytest.mark.parametrize(("cards", "nearest"), [(4, "3 or 6"), (5, "4 or 6"), (7, "6 or 12"), (13, "12")])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(
    monkeypatch: pytest.MonkeyPatch, cards: int, nearest: str
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 16)
    number = {"gradient_accumulation_steps": 12 if cards != 4 else 6}
    for fits in (2, 3, 6):
        check_cards(params(**number), fits)
    with pytest.raises(Fail, match=rf"train\.gradient_accumulation_steps: .* set GPUS to {nearest}, or raise it"):
        check_cards(params(**number), cards)


def test_all_reasons_against_several_cards_are_named():
    with pytest.raises(Fail) as failure:
        check_cards(params(backend="unsloth", gradient_accumulation_steps=3), 2)
    words = ["GPUS=2", "set it to trl", "set GPUS to 1 or 3", f"finds {torch.cuda.device_count()} of 2 cards"]
    assert [word for word in words if word not in str(failure.value)] == []


@pytest.mark.usefixtures("two_cards")
def test_a_step_is_divided_among_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(LAUNCHER, "1")
    monkeypatch.setenv("WORLD_SIZE", "4")  # LOCAL_RANK is not set, so torch starts nothing
    config = arguments(params(per_device_train_batch_size=3, gradient_accumulation_steps=8), tmp_path)
    assert examples_per_step(config, processes=4) == 24
    assert config.ddp_find_unused_parameters is False
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}
