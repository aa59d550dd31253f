"""Start a stage: `python3 -m pipeline.run STAGE ARGUMENTS...`, as dvc.yaml does.

Only the standard library is imported before the stage, because `.venv/bin/dvc repro` without an activated environment
starts this with the system's python3. Nothing here can change a stage's result, so no stage depends on this file.
"""

import ctypes
import errno
import fcntl
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

VENV_PYTHON = Path(__file__).parent.parent / ".venv" / "bin" / "python3"
PR_SET_PDEATHSIG = 1  # prctl(2); the setting survives execv
LAUNCHER = "LAUNCHER_PID"  # in the environment of a training process: pipeline.training.processes
TRAINING = {"pretrain", "train"}  # stages
LOCK_SECONDS = 10  # what a killed run left behind is gone by then
ENVIRONMENT = {
    # A waiting OpenMP thread spins for some microseconds, then sleeps. Without a limit, a training step takes many
    # times as long on a busy machine; with no spinning at all (OMP_WAIT_POLICY=PASSIVE), the many short operations of a
    # small model wait for threads to wake up.
    "GOMP_SPINCOUNT": "1000",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OPENBLAS_NUM_THREADS": "1",  # scikit-learn's problems are small here: more threads only spin
    "TOKENIZERS_PARALLELISM": "false",
}


def die_with_parent() -> None:
    """Let the kernel kill this process when DVC dies, so that no stage runs beside the next `dvc repro`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = os.getppid()
        # The parent died before the call: another process, and init is of another session, is the parent now.
        if parent != int(os.environ[LAUNCHER]) if LAUNCHER in os.environ else os.getsid(parent) != os.getsid(0):
            sys.exit(1)


def show_cards() -> None:
    """Let torch see as many cards as GPUS says, one by default: with two, transformers trains under DataParallel."""
    given = os.environ.get("GPUS", "")
    count = int(given) if re.fullmatch("[1-9][0-9]{0,2}", given) else 1  # the stage refuses what is no number
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = map(str, range(count)) if shown is None else shown.split(",")[:count]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a cluster may set them, and torch would wait for the others
        os.environ.pop(name, None)


def use_venv() -> None:
    """Go on with the project's own interpreter unless this is a virtual environment already."""
    if sys.prefix == sys.base_prefix and VENV_PYTHON.exists():
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.orig_argv[1:]])


def lock_directory() -> bool:
    """Take an exclusive lock on the working directory; False if another run holds it for LOCK_SECONDS."""
    directory = os.open(".", os.O_RDONLY)  # never closed: the lock ends with the process
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system without locks
                return True
            raise


def copy_dvc_lock() -> None:
    """Keep a copy of dvc.lock in .dvc/tmp: DVC writes it in place, so a kill can leave a truncated file."""
    lock, copy = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock")
    if lock.is_file() and copy.parent.is_dir():
        partial = copy.with_name(".dvc.lock.partial")
        shutil.copyfile(lock, partial)
        partial.replace(copy)


def run_stage(stage: str, arguments: list[str]) -> None:
    """Import the stage and call its `main` with `arguments` as paths; end with one sentence on a user's mistake."""
    from pipeline.core.errors import Fail, sentence
    from pipeline.core.packages import check_packages

    try:
        check_packages(stage, Path(sys.prefix))
        main = importlib.import_module(f"pipeline.stages.{stage}").main
        names = list(inspect.signature(main).parameters)
        if len(arguments) != len(names):
            raise Fail(f"expected the paths {' '.join(names)}, got {len(arguments)}; run it by `dvc repro {stage}`")
        main(*map(Path, arguments))
    except Exception as error:
        told = sentence(error)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # the process that started this one says what went wrong
            about = {"message": told or traceback.format_exc(), "timestamp": str(int(time.time()))}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(about), encoding="utf-8")
            sys.exit(1)
        if told is None:
            raise
        sys.exit(f"{stage}: {told}")


def start(argv: list[str]) -> None:
    """Prepare this process, then run the stage that `argv` names."""
    with_others = LAUNCHER in os.environ
    under_dvc = "DVC_STAGE" in os.environ and not with_others  # DVC's own process
    if under_dvc or with_others:
        die_with_parent()
    use_venv()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    stages = sorted(path.stem for path in (Path(__file__).parent / "stages").glob("[a-z]*.py"))
    if not argv or argv[0] not in stages:
        sys.exit(f"usage: python -m pipeline.run STAGE PATHS...; the stages are {', '.join(stages)}")
    stage, *arguments = argv
    if stage in TRAINING and not with_others:
        show_cards()
    if under_dvc:
        if not lock_directory():
            sys.exit(
                f"{stage}: another run of this pipeline is at work in this directory; wait for it or end it, then run "
                "`dvc repro`"
            )
        copy_dvc_lock()
    run_stage(stage, arguments)


if __name__ == "__main__":
    try:
        start(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(f"{sys.argv[1]}: interrupted; run `dvc repro` to continue")
