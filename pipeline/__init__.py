"""medical-reasoner: from PubMedQA to a measured 4-bit GGUF, one module per DVC stage."""

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

# A stage, or a process that it starts, must not live on beside the next run when what started it is killed.
if "DVC_STAGE" in os.environ and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; it outlives the execv below
    if os.getsid(os.getppid()) != os.getsid(0):  # killed before that: what takes an orphan in is of another session
        sys.exit(1)

# `.venv/bin/dvc repro` without activation starts a stage with the system's python3: go on with the project's own.
_python = Path(__file__).parent.parent / ".venv" / "bin" / "python3"
if sys.prefix == sys.base_prefix and _python.exists():
    os.execv(_python, [str(_python), *sys.orig_argv[1:]])

for _name, _value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OPENBLAS_NUM_THREADS": "1",  # scikit-learn's small problems: more threads only spin, for three times the work
    "OMP_WAIT_POLICY": "PASSIVE",  # a waiting thread that spins slows a busy machine's steps 3 to 24 times
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

# It asks for a package that would fetch code from a hub; without it bitsandbytes uses its own kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
