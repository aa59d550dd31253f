"""One training process a card: how many are asked for, and how they are started and end.

The launcher is torch's, which accelerate's uses as well. A process that it starts is `pipeline.run` again.
"""

import logging
import os
import re
import sys

from pipeline.core.errors import Fail
from pipeline.core.outputs import remove
from pipeline.core.resume import CHECKPOINTS
from pipeline.sections.train import Train

LAUNCHER = "LAUNCHER_PID"  # in the environment of the processes that `launch` starts; pipeline/run.py reads it


def asked_for() -> int:
    """The number of cards in the environment variable GPUS, which changes no result; 1 if it is not set."""
    value = os.environ.get("GPUS") or "1"
    if not re.fullmatch("[1-9][0-9]{0,2}", value):
        raise Fail("the environment variable GPUS must be a number of cards, at least 1; correct it, or unset it")
    return int(value)


def processes() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if LAUNCHER in os.environ else 1


def rank() -> int:
    """This process's number among them, which is also its card's; 0 writes the outputs."""
    return int(os.environ["RANK"]) if LAUNCHER in os.environ else 0


def check_cards(params: Train, cards: int) -> None:
    """Raise `Fail` naming every reason why `cards` cards cannot train with these parameters here."""
    import torch

    found: list[str] = []
    if params.backend == "unsloth":
        found.append(f"{params.section}.backend: unsloth trains on one card; set it to trl")
    if (steps := params.gradient_accumulation_steps) % cards:
        divisors = [number for number in range(1, steps + 1) if steps % number == 0]
        nearest = [*[n for n in divisors if n < cards][-1:], *[n for n in divisors if n > cards][:1]]
        found.append(
            f"{params.section}.gradient_accumulation_steps: {steps} cannot be divided among {cards} cards; "
            f"set GPUS to {' or '.join(map(str, nearest))}, or raise it and lower per_device_train_batch_size as much"
        )
    if (visible := torch.cuda.device_count()) < cards:
        found.append(f"torch finds {visible} of {cards} cards; lower GPUS")
    if found:
        raise Fail(f"GPUS={cards}: {'; '.join(found)}; or unset GPUS to train on one card")


def launch(cards: int) -> None:
    """Run this process's command in `cards` processes that train together; raises `Fail` with the first error.

    Only the first writes to the terminal. The kernel kills them when this process dies.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what went wrong is said below
    os.environ[LAUNCHER] = str(os.getpid())
    logs = CHECKPOINTS / "logs"  # of the processes that are silent
    remove(logs)
    logs.mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=cards,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # otherwise the host's name, which may not resolve
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, cards), Std.ALL)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pipeline.run", *sys.argv[1:])
    except SignalException:  # Ctrl-C: torch has ended the processes
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        first, failure = error.get_first_failure()
        if not (text := failure.message).startswith("Traceback") and failure.error_file_data["message"] != "<NONE>":
            raise Fail(text) from None
        ends = [path.read_text("utf-8", "replace")[-2000:] for path in logs.rglob(f"{first}/std*.log")]
        sys.stderr.write("".join([*ends, text, "\n"]))
        raise Fail(
            f"training process {first} ended with status {failure.exitcode}, the lines above say why; run `dvc repro` "
            "to continue"
        ) from None
