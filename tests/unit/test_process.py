"""What a stage says when the process that it starts fails, however it does."""

from pathlib import Path

import pytest

from pipeline.core.errors import Fail
from pipeline.core.process import run_module

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
