"""The launcher of stages, and how stages and commands end: one line and status 1 on a user's mistake."""

import errno
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from pipeline.commands.cli import run_command
from pipeline.core.errors import Fail, sentence
from tests.conftest import ROOT, refused
from tests.conftest import run_command as shell

TOY = """
import errno, os, sys, time
from pathlib import Path
from pipeline.core.errors import Fail

def main(output: Path, does: Path) -> None:
    output.write_text(f"{sys.prefix} {os.environ['GOMP_SPINCOUNT']}")
    match str(does):
        case "wait":
            time.sleep(60)
        case "fail":
            raise Fail("the sentence\\nwith \\x1b in it")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.json")
        case "bug":
            raise KeyError("a bug")
"""
COMMAND = "python3 -m pipeline.run toy started"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A project whose only stage is TOY, with the launcher as it is but for the time that it waits for a lock."""
    texts = {name: (ROOT / "pipeline" / name).read_text() for name in ("run.py", "core/errors.py")}
    texts["run.py"] = texts["run.py"].replace("LOCK_SECONDS = 10", "LOCK_SECONDS = 0.3")
    texts |= {"stages/toy.py": TOY, "core/packages.py": "def check_packages(stage, prefix): pass"}
    for name, text in texts.items():
        (tmp_path / "pipeline" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "pipeline" / name).write_text(text)
    return tmp_path


def start(directory: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that is the stage, once it has begun and waits."""
    command = [sys.executable, *COMMAND.split()[1:], "wait"]
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    while not (directory / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


class TestLauncher:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("", "the stages are toy"),
            ("../toy a b", "the stages are toy"),
            ("toy a", "output does"),
            ("toy a b c", "does"),
        ],
    )
    def test_an_unknown_stage_and_a_wrong_number_of_paths_are_refused(self, here: Path, arguments: str, words: str):
        refused(shell(here, f"python3 -m pipeline.run {arguments}"), words)

    @pytest.mark.parametrize(
        ("does", "sentence"),
        [("fail", "toy: the sentence\\nwith \\x1b in it"), ("full", "toy: x.json: No space left on device")],
    )
    def test_a_user_s_mistake_and_a_full_disk_end_in_one_line(self, here: Path, does: str, sentence: str):
        done = shell(here, f"{COMMAND} {does}")
        refused(done, sentence)
        assert done.stderr.count("\n") == 1

    def test_a_bug_keeps_its_traceback(self, here: Path):
        assert "Traceback" in shell(here, f"{COMMAND} bug").stderr

    def test_ctrl_c_ends_in_one_line(self, here: Path):
        process = start(here)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "toy: interrupted; run `dvc repro` to continue\n"
        assert process.returncode == 1

    def test_what_the_user_set_in_the_environment_stays(self, here: Path):
        for environment, value in (({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5")):
            inherited = {name: text for name, text in os.environ.items() if name != "GOMP_SPINCOUNT"}
            command = [sys.executable, *COMMAND.split()[1:], "nothing"]
            subprocess.run(command, cwd=here, env=inherited | environment, check=True)
            assert (here / "started").read_text().split()[1] == value

    def test_a_python_outside_any_environment_goes_on_with_the_projects_own(self, here: Path):
        """As under `.venv/bin/dvc repro` without activation."""
        venv.create(here / ".venv", symlinks=True)
        system = Path(sys.base_prefix, "bin", "python3")
        subprocess.run([system, *COMMAND.split()[1:], "nothing"], cwd=here, check=True)
        assert (here / "started").read_text().split()[0] == str(here / ".venv")

    def test_no_second_stage_runs_in_a_directory_under_dvc(self, here: Path):
        with start(here, DVC_STAGE="toy") as first:
            refused(shell(here, f"{COMMAND} nothing", DVC_STAGE="toy"), "another run of this pipeline is at work")
            assert (
                shell(here, f"{COMMAND} nothing").returncode == 0
            )  # started by hand: what it does is its user's matter
            first.kill()
        assert shell(here, f"{COMMAND} nothing", DVC_STAGE="toy").returncode == 0

    def test_a_stage_dies_with_dvc(self, here: Path):
        dvc = subprocess.Popen(
            ["sh", "-c", f"DVC_STAGE=toy {sys.executable} {COMMAND.partition(' ')[2]} wait & wait"],
            cwd=here,
            stdout=subprocess.PIPE,
        )
        while not (here / "started").exists():
            time.sleep(0.01)
        dvc.kill()
        dvc.communicate(timeout=20)  # the pipe is at its end when nobody holds it any more

    @pytest.mark.parametrize("of_dvc", [True, False])
    def test_a_stage_whose_dvc_was_killed_before_it_began_does_not_begin(self, here: Path, of_dvc: bool):
        """An orphan has another parent by the time Python is there, and no signal will come from that one."""
        orphan = f"(sleep 0.2; exec {sys.executable} {COMMAND.partition(' ')[2]} nothing) &"
        environment = {**os.environ, **({"DVC_STAGE": "toy"} if of_dvc else {})}
        # The output is at its end when the orphan has ended.
        subprocess.run(
            ["sh", "-c", orphan], cwd=here, env=environment, start_new_session=True, capture_output=True, check=True
        )
        assert (here / "started").exists() != of_dvc

    def test_a_copy_of_dvc_lock_is_kept_as_the_stage_found_it(self, here: Path):
        assert shell(here, f"{COMMAND} nothing", DVC_STAGE="toy").returncode == 0
        assert not (here / ".dvc").exists()
        (here / ".dvc" / "tmp").mkdir(parents=True)
        for text in ("first", "second"):
            (here / "dvc.lock").write_text(text)
            assert shell(here, f"{COMMAND} nothing", DVC_STAGE="toy").returncode == 0
            assert (here / ".dvc" / "tmp" / "dvc.lock").read_text() == text
        assert [path.name for path in (here / ".dvc" / "tmp").iterdir()] == ["dvc.lock"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), "x.json: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "could not be written (PytorchStreamWriter failed)"),
        (OSError("7 requested and 3 written"), "could not be written (7 requested and 3 written)"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "None"),
        (KeyError("a bug"), "None"),
    ],
)
def test_a_disk_that_cannot_be_written_is_the_users_problem_and_other_errors_are_not(error: Exception, words: str):
    assert words in str(sentence(error))


def test_a_users_mistake_in_a_command_ends_in_one_line():
    def main() -> None:
        raise Fail("the sentence")

    with pytest.raises(SystemExit, match=r"^toy: the sentence"):
        run_command("toy", main, [])


def test_the_commands_are_listed_and_no_other_is_run():
    names = [line.split()[0] for line in shell(ROOT, "python3 -m pipeline").stdout.splitlines()[1:]]
    assert {"ask", "summary", "gate"} <= set(names)
    assert shell(ROOT, "python3 -m pipeline nothing").returncode == 1


def test_a_command_goes_on_in_the_projects_environment_or_says_how_to_make_it(tmp_path: Path):
    for name in ("__main__.py", "run.py", "commands/summary.py"):
        (tmp_path / "pipeline" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "pipeline" / name).write_text((ROOT / "pipeline" / name).read_text())
    system = Path(sys.base_prefix, "bin", "python3")
    for python in (system, tmp_path / ".venv/bin/python3"):
        done = subprocess.run([system, "-m", "pipeline", "summary"], cwd=tmp_path, capture_output=True, text=True)
        sentence = f"summary: {python} has no package typer; run `make setup`, then `. .venv/bin/activate`\n"
        assert (done.returncode, done.stderr) == (1, sentence)
        venv.create(tmp_path / ".venv", symlinks=True)
