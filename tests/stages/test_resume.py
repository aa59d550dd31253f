"""A stage that was killed goes on from what it had written, and ends with the bytes of one that was not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.core.errors import Fail
from pipeline.core.resume import CHECKPOINTS
from pipeline.training.checkpoints import COMPLETE, digests, last_checkpoint
from pipeline.training.trainer import memory_errors
from tests.conftest import run_stage, set_params
from tests.stages.helpers import call, change_json, numbers, start, writable_copy

SAME = [
    "models/adapter/adapter_model.safetensors",
    "models/adapter/adapter_config.json",
    "models/adapter/training.json",
    "metrics/train_log.csv",
]
# Four steps an epoch: the checkpoint lies in the second, and dropout draws random numbers at every step.
LONGER = {"max_steps": 9, "per_device_train_batch_size": 8, "lora_dropout": 0.1}


def kill(project: Path, stage: str, pattern: str, size: int = 0, **environment: str) -> Path:
    """Start `stage` and send it SIGKILL as soon as a file in .checkpoints has more than `size` bytes; the file."""
    with start(project, stage, **environment) as process:
        while not (found := [path for path in (project / CHECKPOINTS).glob(pattern) if path.stat().st_size > size]):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return found[0]


def kill_training(project: Path, step: int) -> Path:
    """Kill `train` after a step; returns the complete checkpoint of that step."""
    return kill(project, "train", f"*/checkpoint-{step}/{COMPLETE}", SAVE_STEPS=str(step)).parent


@pytest.mark.slow
@pytest.mark.parametrize("longer", [False, True], ids=["3 steps", "2 epochs"])
def test_a_killed_training_goes_on_and_ends_the_same(micro: Path, project: Path, tmp_path: Path, longer: bool) -> None:
    whole, step, steps = micro, 1, 3
    if longer:
        set_params(project, "train", **LONGER)
        (tmp_path / "whole").mkdir()
        whole, step, steps = writable_copy(project, tmp_path / "whole"), 5, 9
        assert call(whole, "train") == ""
    checkpoint = kill_training(project, step)
    # As if a step had been skipped, and memory had been fuller, before the kill.
    history = numbers(checkpoint / "trainer_state.json")["log_history"]
    history[0] |= {"skipped": True, "vram_allocated_mib": 123.5, "vram_reserved_mib": 234.5}
    change_json(checkpoint / "trainer_state.json", log_history=history)
    (checkpoint / COMPLETE).write_text(json.dumps(digests(checkpoint)))
    (project / CHECKPOINTS / "another").mkdir()
    shutil.rmtree(project / "models" / "adapter")  # as DVC does before it runs the stage again
    project = Path(shutil.move(project, tmp_path / "another machine"))
    result = run_stage(project, "train")
    assert result.returncode == 0, result.stderr
    for name in SAME:
        assert (project / name).read_bytes() == (whole / name).read_bytes(), name
    assert numbers(project / "metrics/train.json") == numbers(whole / "metrics/train.json") | {"skipped_steps": 1}
    resources = numbers(project / "metrics" / "train_resources.json")
    assert resources["resumed_after_step"] == step
    assert (resources["peak_vram_allocated_mib"], resources["peak_vram_reserved_mib"]) == (123.5, 234.5)
    assert len((project / "metrics" / "train_memory.csv").read_text().splitlines()) == 1 + steps
    assert not (project / CHECKPOINTS).exists()


def test_a_killed_evaluation_goes_on_and_ends_the_same(project: Path) -> None:
    table = project / "metrics" / "predictions" / "tuned.csv"
    before = table.read_bytes().splitlines()
    journal = kill(project, "evaluate", "*.jsonl", size=500)
    with journal.open("a") as file:
        file.write('["chat", "9000000')  # as if the kill had cut a line
    # An answer that only the journal holds shows that it is read.
    first, *rest = journal.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row[-1] = str(int(row[-1]) + 1)
    journal.write_text("".join([json.dumps(row) + "\n", *rest]))
    table.unlink()
    result = run_stage(project, "evaluate")
    assert result.returncode == 0, result.stderr
    assert len(rest) < 60
    assert table.read_bytes().splitlines() == [before[0], ",".join(row).encode(), *before[2:]]
    assert not (project / CHECKPOINTS).exists()


@pytest.mark.slow
def test_killed_answers_go_on_and_end_the_same(project: Path) -> None:
    file = project / "data" / "answers.jsonl"
    before = file.read_bytes().splitlines()
    journal = kill(project, "generate", "*.jsonl", size=2000)
    first, *rest = journal.read_bytes().splitlines()
    changed = first.replace(b'"text":"', b'"text":"Only in the journal. ')
    journal.write_bytes(b"\n".join([changed, *rest, b'{"model": "base", "pmid']))
    file.unlink()
    result = run_stage(project, "generate")
    assert result.returncode == 0, result.stderr
    assert len(rest) < 39
    assert file.read_bytes().splitlines() == [changed, *before[1:]]
    assert not (project / CHECKPOINTS).exists()


def checkpoint(directory: Path, step: int) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_text(f"moments after step {step}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (path / COMPLETE).write_text(json.dumps(digests(path)))
    return path


def test_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step in (20, 100, 80):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", COMPLETE])
@pytest.mark.parametrize("damage", ["gone", "cut", "altered"])
def test_an_incomplete_checkpoint_is_passed_over_and_removed(tmp_path: Path, name: str, damage: str) -> None:
    older, newer = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    body = (newer / name).read_bytes()
    (newer / name).unlink()
    if damage != "gone":
        (newer / name).write_bytes(body[: len(body) // 2] if damage == "cut" else body.replace(b"2", b"3"))
    assert last_checkpoint(tmp_path) == older
    assert not newer.exists()


@pytest.mark.parametrize("where", ["a card", "Python", "a CPU"])
def test_running_out_of_memory_names_the_parameters_to_lower(where: str) -> None:
    import torch

    def fail() -> None:
        if where == "a CPU":
            torch.empty(1 << 60, dtype=torch.uint8)  # what torch itself raises
        raise torch.OutOfMemoryError("CUDA out of memory.") if where == "a card" else MemoryError

    words = (
        r"out of memory.*train\.per_device_train_batch_size.*gradient_accumulation_steps.*gradient_checkpointing.* r$"
    )
    with pytest.raises(Fail, match=words), memory_errors("train"):
        fail()
