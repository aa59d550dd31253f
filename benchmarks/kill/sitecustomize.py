"""Python imports this at its start when this directory is on PYTHONPATH: it kills a stage, or DVC, where that writes.

KILL_STAGE names the stage; KILL_POINT whose changes of the project's files count: the stage's (write), or DVC's own
from that stage's start to the next one's (dvc; those of dvc.lock alone: dvc.lock). KILL_AT is the change to kill at,
from 1; KILL_AFTER how many seconds later, so that it can be in the middle of what is written; KILL_WHOM whom: stage,
group (DVC and all it started) or dvc; KILL_SIGNAL by another signal than KILL. KILL_NOTE is a file to name the change
in before the kill. If that never comes, DVC is killed when it starts the next stage, with nothing in the note.
KILL_COUNT is a directory to note the numbers of changes in, and a stage's seconds, when all is over.
"""

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = str(Path.cwd()) + os.sep
# Audit events, and which of their arguments is the path that changes.
CHANGES = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.link": 1, "os.symlink": 1}
NOTE = Path(os.environ.get("KILL_NOTE", os.devnull))
START = time.monotonic()
of_dvc = sys.orig_argv[1:3] == ["-m", "dvc"]
stage = ""  # this process's own, or the one that DVC started last
seen = Counter[tuple[str, str]]()  # of a stage and a point


def changed(event: str, args: tuple[Any, ...]) -> str:
    """The file of the project that an audit event is a change to; empty if it is none."""
    if event == "open":
        path, _, flags = args
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return ""
    elif event in CHANGES:
        path = args[CHANGES[event]]
    else:
        return ""
    if not isinstance(path, str | bytes | os.PathLike):
        return ""
    path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100  # of a file that may be gone
    return path.removeprefix(ROOT) if path.startswith(ROOT) and "__pycache__" not in path else ""


def kill(whom: str) -> None:
    sent = signal.Signals[f"SIG{os.environ.get('KILL_SIGNAL', 'KILL')}"]
    if whom == "group":
        os.killpg(0, sent)
        return
    of_parent = whom == "dvc" and not of_dvc  # a stage is a child of DVC's own
    os.kill(os.getppid() if of_parent else os.getpid(), sent)


def strike(change: str) -> None:
    """Note what is struck, then kill, now or a little later."""
    NOTE.write_text(change)
    if after := float(os.environ["KILL_AFTER"]):
        threading.Thread(target=later, args=(after, seen.total()), daemon=True).start()
    else:
        kill(os.environ["KILL_WHOM"])


def later(after: float, total: int) -> None:
    time.sleep(after)
    if of_dvc and seen.total() > total:  # it is written, and DVC at something else
        NOTE.unlink()
    else:
        kill(os.environ["KILL_WHOM"])


def watch(event: str, args: tuple[Any, ...]) -> None:
    global stage
    if of_dvc and event == "subprocess.Popen" and (found := re.search(r"-m pipeline\.run (\w+)", str(args[1]))):
        if stage == os.environ.get("KILL_STAGE"):  # it is over: DVC's last moment before the next one, or a miss
            NOTE.write_text("the start of the next stage" if os.environ["KILL_POINT"] == "dvc" else "")
            kill("dvc")
        stage = found[1]
    if not stage or not (path := changed(event, args)):
        return
    for point in ["write"] if not of_dvc else ["dvc", "dvc.lock"] if path == "dvc.lock" else ["dvc"]:
        seen[stage, point] += 1
        if [stage, point, str(seen[stage, point])] == [os.environ.get(f"KILL_{x}") for x in ("STAGE", "POINT", "AT")]:
            strike(f"{event} {path}")


def note_counts(directory: Path) -> None:
    for name in {name for name, _ in seen}:
        counts = {point: number for (of, point), number in seen.items() if of == name}
        figures = counts if of_dvc else {**counts, "seconds": time.monotonic() - START}
        (directory / f"{name}.{'dvc' if of_dvc else 'stage'}.json").write_text(json.dumps(figures))


if of_dvc or sys.orig_argv[1:3] == ["-m", "pipeline.run"]:
    stage = "" if of_dvc else sys.orig_argv[3]
    if os.environ.get("KILL_POINT") or os.environ.get("KILL_COUNT"):
        sys.addaudithook(watch)
    if count := os.environ.get("KILL_COUNT"):
        atexit.register(note_counts, Path(count))
