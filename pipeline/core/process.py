"""A module of the project in a Python process of its own, which prints its result or one sentence about an error."""

import os
import signal
import subprocess
import sys
from functools import partial

from pipeline.core.errors import Fail


def run_module(name: str, *arguments: str, given: str = "", **environment: str) -> str:
    """The last line that `python -m NAME ARGUMENTS` prints, `given` as its input; raises `Fail` with it on an error."""
    command, env = [sys.executable, "-m", name, *arguments], os.environ | environment
    quiet = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C, this process ends it
    done = subprocess.run(
        command, input=given, stdout=subprocess.PIPE, text=True, env=env, check=False, preexec_fn=quiet
    )
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode < 0:
        raise Fail(f"{name} was ended by signal {-done.returncode}; free memory if it ran out, then run `dvc repro`")
    if done.returncode > 0:
        raise Fail(last or f"{name} failed; the lines above say why")
    return last
