"""What a stage says when the process that it starts fails, however it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.errors import Fail
from pipeline.core.process import run_module
from tests.conftest import ROOT

ENDS = {
    "print('note'); print('it is so'); sys.exit(1)": "it is so",
    "sys.exit(3)": "worker failed; the lines above say why",
    "os.kill(os.getpid(), 9)": "worker was ended by signal 9; free memory",
}


@pytest.fixture(autouse=True)
def _path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("size", [0, 1 << 20])  # more than a pipe holds
@pytest.mark.parametrize("code", ENDS)
def test_a_process_that_ends_without_reading_its_input_becomes_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: str, size: int
):
    (tmp_path / "worker.py").write_text(f"import os, sys\n{code}")
    with pytest.raises(Fail, match=f"^{ENDS[code]}"):
        run_module("worker", given="x" * size)
    assert capfd.readouterr().err == ""


def test_the_last_line_is_the_result_of_arguments_input_and_environment(tmp_path: Path):
    (tmp_path / "worker.py").write_text("import os, sys\nprint('note')\nprint(sys.argv[1], input(), os.environ['X'])")
    assert run_module("worker", "a", given="b\n", X="c") == "a b c"


def test_no_hook_of_a_library_runs_at_the_start(tmp_path: Path):
    """huggingface_hub's closes its connections in a forked child, and waits for a lock that another thread holds."""
    forks: list[None] = []
    os.register_at_fork(before=lambda: forks.append(None))
    (tmp_path / "worker.py").write_text("print('done')")
    assert (run_module("worker"), forks) == ("done", [])


def test_ctrl_c_ends_the_process_without_a_traceback_of_its_own(tmp_path: Path):
    code = "import os, pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)"
    (tmp_path / "worker.py").write_text(code)
    (tmp_path / "caller.py").write_text(
        "import signal\nfrom pipeline.core.process import run_module\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it\n"
        "run_module('worker')"
    )
    process = subprocess.Popen(
        [sys.executable, "caller.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    errors = process.communicate(timeout=20)[1]  # ends when no process has the pipe open
    assert errors.count("Traceback") == 1
    assert "KeyboardInterrupt" in errors
