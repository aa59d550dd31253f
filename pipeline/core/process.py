"""A module of the project in a Python process of its own, which prints its result or one sentence about an error."""

import os
import subprocess
import sys

from pipeline.core.errors import Fail


def run_module(name: str, *arguments: str, given: str = "", **environment: str) -> str:
    """The last line that `python -m NAME ARGUMENTS` prints, `given` as its input; raises `Fail` with it on an error."""
    # At Ctrl-C, this process ends the other. `preexec_fn` would run hooks of libraries in the child: huggingface_hub's
    # waits for a lock that another thread of this process may hold at the fork.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", name, *arguments]
    env = os.environ | environment
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, env=env, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode < 0:
        raise Fail(f"{name} was ended by signal {-done.returncode}; free memory if it ran out, then run `dvc repro`")
    if done.returncode > 0:
        raise Fail(last or f"{name} failed; the lines above say why")
    return last
