"""Python imports this at its start when this directory is on PYTHONPATH: it kills a stage where it writes or renames.

KILL_STAGE names the stage; KILL_AT the write, rename, removal or new directory within the project at which it is hit,
counted from 1; KILL_AFTER how many seconds later, so that it can be in the middle of what it writes; KILL_WHOM whom:
stage, group (DVC and all it started) or dvc. KILL_COUNT is a file to note the number of such points in when it ends.
"""

import atexit
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = str(Path.cwd()) + os.sep
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
seen = 0


def changes(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event is a change to a file of the project."""
    if event == "open":
        path, _, flags = args
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in CHANGES:
        path = args[0]
    else:
        return False
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100  # of a file that may be gone
    return path.startswith(ROOT) and "__pycache__" not in path


def kill() -> None:
    """Send SIGKILL to KILL_WHOM; the parent of a stage is DVC, or a shell whose parent that is."""
    match os.environ["KILL_WHOM"]:
        case "group":
            os.killpg(0, signal.SIGKILL)
        case "dvc":
            parent = os.getppid()
            while "dvc" not in Path(f"/proc/{parent}/cmdline").read_text():
                parent = int(Path(f"/proc/{parent}/stat").read_text().rsplit(")")[-1].split()[1])
            os.kill(parent, signal.SIGKILL)
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


def later() -> None:
    time.sleep(float(os.environ["KILL_AFTER"]))
    kill()


def watch(event: str, args: tuple[Any, ...]) -> None:
    global seen
    if changes(event, args):
        seen += 1
        if seen == int(os.environ.get("KILL_AT", "0")):
            if float(os.environ["KILL_AFTER"]):
                threading.Thread(target=later, daemon=True).start()
            else:
                kill()


if sys.orig_argv[1:3] == ["-m", f"pipeline.{os.environ.get('KILL_STAGE')}"]:
    if count := os.environ.get("KILL_COUNT"):
        atexit.register(lambda: Path(count).write_text(str(seen)))
    sys.addaudithook(watch)
