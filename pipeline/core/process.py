"""A module of the project in a Python process of its own, which prints its result or one sentence about an error."""

import os
import signal
import subprocess
import sys

from pipeline.core.errors import Fail


def run_module(name: str, *arguments: str, given: str = "", **environment: str) -> str:
    """The last line that `python -m NAME ARGUMENTS` prints, `given` as its input; raises `Fail` with it on an error."""
    command, env = [sys.executable, "-m", name, *arguments], os.environ | environment
    # At Ctrl-C, this process ends the other, which inherits the blocked signal. A `preexec_fn` would run hooks of
    # libraries in the child: huggingface_hub's waits for a lock that a thread of this process may hold at the fork.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                printed, _ = process.communicate(given)
            except BaseException:
                process.kill()
                raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    last = printed.strip().rpartition("\n")[2]
    if process.returncode < 0:
        raise Fail(f"{name} was ended by signal {-process.returncode}; free memory if it ran out, then run `dvc repro`")
    if process.returncode > 0:
        raise Fail(last or f"{name} failed; the lines above say why")
    return last
