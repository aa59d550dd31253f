"""A training that was killed goes on from its last whole checkpoint, and ends as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.records import CHECKPOINTS, run_key
from pipeline.core.stage import Fail
from pipeline.stages.train import COMPLETE, Params, device, digests, last_checkpoint, memory_errors
from tests.conftest import ROOT, copy_project, output_of, repro, run_stage, set_params, stages, tried, yaml

SAME = ["models/adapter/adapter_model.safetensors", "models/adapter/adapter_config.json", "metrics/train_log.csv"]
# Four steps an epoch: the checkpoint lies in the second, and dropout draws random numbers at every step.
CHANGES = {"max_steps": 9, "save_steps": 5, "per_device_train_batch_size": 8, "lora_dropout": 0.1}
VALUES: dict[str, Any] = yaml.load((ROOT / "profiles" / "micro.yaml").read_text())["train"]


def kill_after(project: Path, step: int) -> Path:
    """Start `train` and send it SIGKILL as soon as the checkpoint of that step is whole; returns the checkpoint."""
    command = stages(project)["train"]["cmd"].split()[2:]
    with subprocess.Popen([sys.executable, *command], cwd=project, stderr=subprocess.DEVNULL) as process:
        while not (found := list((project / CHECKPOINTS).glob(f"*/checkpoint-{step}/{COMPLETE}"))):
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return found[0].parent


def test_a_killed_training_goes_on_and_ends_the_same(project: Path, tmp_path: Path):
    set_params(project, "train", **CHANGES)
    killed = Path(shutil.copytree(project, tmp_path / "killed"))
    assert run_stage(project, "train").returncode == 0
    assert not (project / CHECKPOINTS).exists()

    checkpoint = kill_after(killed, 5)
    # As if a step had been skipped, and memory had been fuller, before the kill.
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"][0] |= {"skipped": True, "vram_allocated_mib": 123.5, "vram_reserved_mib": 234.5}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / COMPLETE).write_text(json.dumps(digests(checkpoint)))
    (killed / CHECKPOINTS / "another").mkdir()
    shutil.rmtree(killed / "models" / "adapter")  # as DVC does before it runs the stage again
    with tried("resume", "train, killed after its checkpoint of step 5 of 9") as seen:
        result = run_stage(killed, "train")
        assert result.returncode == 0, result.stderr

        for name in SAME:
            assert (killed / name).read_bytes() == (project / name).read_bytes(), name
        one, two = (json.loads((path / "metrics" / "train.json").read_text()) for path in (project, killed))
        assert two == one | {"skipped_steps": 1}
        resources = json.loads((killed / "metrics" / "train_resources.json").read_text())
        assert resources["resumed_after_step"] == 5
        assert (resources["peak_vram_allocated_mib"], resources["peak_vram_reserved_mib"]) == (123.5, 234.5)
        assert resources["tokens_per_second"] > 0
        assert len((killed / "metrics" / "train_memory.csv").read_text().splitlines()) == 1 + 9
        assert not (killed / CHECKPOINTS).exists()
        seen.append("nothing: it goes on after step 5 and ends the same")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"learning_rate": 1e-3}, {"seed": 1}, {"max_steps": 8}])
def test_a_changed_parameter_begins_anew(project: Path, tmp_path: Path, changes: dict[str, Any]):
    set_params(project, "train", **CHANGES)
    kill_after(project, 5)
    fresh = Path(shutil.copytree(project, tmp_path / "fresh", ignore=shutil.ignore_patterns(".checkpoints")))
    for path in (project, fresh):
        assert run_stage(path, "train", **changes).returncode == 0
    assert json.loads((project / "metrics" / "train_resources.json").read_text())["resumed_after_step"] == 0
    for name in SAME:
        assert (fresh / name).read_bytes() == (project / name).read_bytes(), name


@pytest.mark.slow
def test_another_clone_goes_on_with_what_a_lost_machine_left_on_its_disk(project: Path, tmp_path: Path):
    """A spot machine: the second clone gets the first one's .checkpoints/ and DVC's cache, and nothing else."""
    set_params(project, "train", **CHANGES)
    assert run_stage(project, "train").returncode == 0

    def clone(name: str) -> Path:
        directory = copy_project(tmp_path / name)
        set_params(directory, "train", **CHANGES)
        subprocess.run(["git", "init", "--quiet"], cwd=directory, check=True)
        output_of(directory, f"python3 -m dvc config --local cache.dir {tmp_path / 'disk' / 'cache'}")
        return directory

    first = clone("first")
    assert repro(first, "format") == ["download", "base", "format"]
    kill_after(first, 5)
    second = clone("elsewhere/second")
    shutil.move(first / CHECKPOINTS, second / CHECKPOINTS)
    shutil.rmtree(first)
    ran = repro(second, "train")
    assert ran[-1] == "train"
    assert json.loads((second / "metrics" / "train_resources.json").read_text())["resumed_after_step"] == 5
    for name in SAME:
        assert (second / name).read_bytes() == (project / name).read_bytes(), name


def test_the_key_holds_all_that_determines_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, code = tmp_path / "train.jsonl", tmp_path / "train.py"
    data.write_text("{}\n")
    code.write_text("")
    monkeypatch.setattr("pipeline.stages.train.__file__", str(code))

    def key(**changes: Any) -> str:
        return run_key(Params.check("train", VALUES | changes), [data], device())

    keys = [key()]
    assert key() == keys[0]
    for name, value in VALUES.items():
        match value:
            case bool():
                other: Any = not value
            case int() | float():
                other = value + 0.5 if isinstance(value, float) else value + 1
            case list():
                other = value[:-1]
            case _:
                allowed = {"trl": "unsloth", "nf4": "fp4", "float32": "bfloat16", "linear": "cosine"}
                other = allowed.get(value, "adamw_8bit")
        keys.append(key(**{name: other}))
    data.write_text("{} \n")
    keys.append(key())
    code.write_text("# edited")
    keys.append(key())
    monkeypatch.setattr("pipeline.core.records.distributions", list)
    keys.append(key())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    keys.append(key())
    assert len(set(keys)) == len(keys) == 1 + len(VALUES) + 4


def checkpoint(directory: Path, step: int) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_text(f"moments after step {step}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (path / COMPLETE).write_text(json.dumps(digests(path)))
    return path


def test_the_newest_checkpoint_is_taken(tmp_path: Path):
    assert last_checkpoint(tmp_path / "none") is None
    for step in (20, 100, 80):
        newest = checkpoint(tmp_path, step)
    newest = tmp_path / "checkpoint-100"
    assert last_checkpoint(tmp_path) == newest
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", COMPLETE])
@pytest.mark.parametrize("damage", ["gone", "cut", "altered"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_removed(tmp_path: Path, name: str, damage: str):
    older, newer = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    body = (newer / name).read_bytes()
    match damage:
        case "gone":
            (newer / name).unlink()
        case "cut":
            (newer / name).write_bytes(body[: len(body) // 2])
        case _:
            (newer / name).write_bytes(body.replace(b"2", b"3"))
    assert last_checkpoint(tmp_path) == older
    assert not newer.exists()


def test_running_out_of_memory_names_the_parameters_to_lower():
    import torch

    words = r"out of memory.*per_device_train_batch_size.*gradient_accumulation_steps.*gradient_checkpointing.*train\.r"
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        with tried("memory", f"train: {type(error).__name__}") as seen:
            with pytest.raises(Fail, match=words) as found, memory_errors():
                raise error
            seen.append(str(found.value))
    with tried("memory", "train: a tensor that finds no memory on a CPU") as seen:
        with pytest.raises(Fail, match=words) as found, memory_errors():
            torch.empty(1 << 60, dtype=torch.uint8)  # what torch itself says on a CPU
        seen.append(str(found.value))
    with pytest.raises(RuntimeError, match="a bug"), memory_errors():
        raise RuntimeError("a bug")


def test_a_killed_evaluation_goes_on_and_ends_the_same(project: Path):
    table = project / "metrics" / "predictions" / "tuned.csv"
    before = table.read_bytes()
    command = stages(project)["evaluate"]["cmd"].split()[2:]
    with subprocess.Popen([sys.executable, *command], cwd=project, stderr=subprocess.DEVNULL) as process:
        while not any(path.stat().st_size > 500 for path in (project / CHECKPOINTS).glob("*.jsonl")):
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    (journal,) = (project / CHECKPOINTS).glob("*.jsonl")
    with journal.open("a") as file:
        file.write('["chat", "9000000')  # as if the kill had cut a line
    kept = journal.read_text().count("\n")
    # An answer that only the journal holds shows that it is read.
    lines = journal.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    lines[0] = json.dumps([*row[:-1], row[-1] + 1]) + "\n"
    journal.write_text("".join(lines))
    table.unlink()
    with tried("resume", "evaluate, killed between two of its 120 questions, the last line of its journal cut") as seen:
        result = run_stage(project, "evaluate")
        assert result.returncode == 0, result.stderr
        first, second, *rest = table.read_bytes().splitlines()
        assert kept < 120
        assert [first, *rest] == [line for i, line in enumerate(before.splitlines()) if i != 1]
        assert second == ",".join(map(str, json.loads(lines[0]))).encode()
        assert not (project / CHECKPOINTS).exists()
        seen.append("nothing: it goes on after the last whole answer and ends the same")


def test_a_refused_evaluation_leaves_no_journal(project: Path):
    assert run_stage(project, "evaluate", n_ctx=64).returncode == 1
    assert not (project / CHECKPOINTS).exists()
