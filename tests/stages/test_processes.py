"""Two processes with gloo, on a CPU, train as one does: the same steps, and nothing is left of a killed run."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.core.resume import CHECKPOINTS
from pipeline.training.checkpoints import COMPLETE
from tests.conftest import refused, run_command, set_params, stages
from tests.stages.helpers import call, numbers, table, writable_copy

# `train` as the launcher runs it, but for the number of cards that torch must find.
TWO = """
import sys
from pipeline.run import start
from pipeline.training import fit
fit.check_cards = lambda *_: None
start(sys.argv[1:])
"""
# 32 examples: eleven batches an epoch, the last one of two, so that its last step is short in examples and in batches.
LONGER = {"max_steps": 8, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "warmup_steps": 0}


@pytest.fixture
def one(project: Path) -> Path:
    """A project in which one process trained."""
    assert call(project, "train", **LONGER) == ""
    return project


@pytest.fixture
def two(micro: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A project without an adapter, and the command with which two processes train there."""
    (tmp_path / "two").mkdir()
    project = writable_copy(micro, tmp_path / "two")
    set_params(project, "train", **LONGER)
    shutil.rmtree(project / "models" / "adapter")
    (project / "two.py").write_text(TWO)
    command = stages(project)["train"]["cmd"].partition("pipeline.run ")[2].split()
    return project, [sys.executable, "two.py", *command]


ENVIRONMENT = {"GPUS": "2", "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}


def start(project: Path, command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=project, env=os.environ | ENVIRONMENT | environment, stderr=subprocess.PIPE, text=True
    )


def descendants(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_the_loss_curve_is_that_of_one_process_also_after_a_kill_that_leaves_no_process(
    one: Path, two: tuple[Path, list[str]]
) -> None:
    """In float32, to 1e-5 of each loss: sums are taken in another order."""
    project, command = two
    dvc = ["sh", "-c", '"$@" & wait', "dvc", *command]
    killed = start(project, dvc, SAVE_STEPS="5", DVC_STAGE="train")
    wait_for(lambda: bool([*(project / CHECKPOINTS).glob(f"*/checkpoint-5/{COMPLETE}")]), killed)
    started = descendants(psutil.Process(killed.pid))
    assert len(started) >= 3  # the stage and its two processes
    killed.kill()
    killed.communicate(timeout=60)  # the pipe is at its end when no process holds it any more
    psutil.wait_procs(started, timeout=60)
    assert [process for process in started if process.is_running() and process.status() != "zombie"] == []

    resumed = start(project, command)
    _, printed = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, printed
    resources = numbers(project / "metrics" / "train_resources.json")
    assert (resources["processes"], resources["resumed_after_step"]) == (2, 5)
    before, after = (table(path / "metrics" / "train_log.csv") for path in (one, project))
    for name in ("loss", "grad_norm"):
        assert [float(row[name]) for row in after] == pytest.approx([float(row[name]) for row in before], rel=1e-5)
    losses = [numbers(path / "metrics" / "train.json")["validation_loss"] for path in (one, project)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert printed.count("Loading weights: 100%") == 1  # the other process is silent
    assert not (project / CHECKPOINTS).exists()


@pytest.mark.slow
def test_an_error_of_any_process_is_one_sentence_of_the_first(two: tuple[Path, list[str]]) -> None:
    project, command = two
    set_params(project, "train", target_modules=["q_prj"])
    process = start(project, command)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 1
    assert printed.strip().splitlines()[-1].startswith("train: params.yaml: train.target_modules: the base has no")
    assert "Traceback" not in printed
    assert printed.count("target_modules") == 1


def test_a_process_that_is_killed_ends_the_others(two: tuple[Path, list[str]]) -> None:
    project, command = two
    process = start(project, command)

    def second() -> list[psutil.Process]:
        found = descendants(psutil.Process(process.pid))
        with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived one
            return [child for child in found if child.environ().get("RANK") == "1"]
        return []

    wait_for(lambda: bool(second()), process)
    second()[0].send_signal(signal.SIGKILL)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "train: training process 1 ended with status -9" in printed.splitlines()[-1]


@pytest.mark.slow
def test_several_cards_are_refused_where_they_are_not(project: Path) -> None:
    done = run_command(project, stages(project)["train"]["cmd"], GPUS="2", CUDA_VISIBLE_DEVICES="")
    refused(done, "GPUS=2", "train.gradient_accumulation_steps", "torch finds 0 of 2 cards")
