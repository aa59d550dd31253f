"""Strict parameters, one-sentence errors, and outputs that appear whole or not at all."""

import ast
import errno
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

import pipeline
from pipeline.core.stage import Fail, Section, run, scratch, writing
from tests.conftest import ROOT


class Toy(Section):
    r: Annotated[int, Field(gt=0)]
    learning_rate: float
    packing: bool


GOOD = "toy:\n  r: 16\n  learning_rate: 1e-4\n  packing: false\n"


def load(directory: Path, text: str) -> Toy:
    (directory / "params.yaml").write_text(text)
    return Toy.load("toy")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_yaml_1_2_numbers(tmp_path: Path):
    params = load(tmp_path, GOOD)
    assert params == Toy(r=16, learning_rate=0.0001, packing=False)
    assert type(params.learning_rate) is float


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  r: 16\n", "", ["toy.r", "required"]),
        ("  r: 16\n", "  r: 16\n  rank: 8\n", ["toy.rank", "not permitted"]),
        ("r: 16", "r: '16'", ["toy.r", "integer"]),
        ("r: 16", "r: 16.0", ["toy.r", "integer"]),
        ("r: 16", "r: true", ["toy.r", "integer"]),
        ("r: 16", "r:", ["toy.r", "integer"]),
        ("r: 16", "r: 0", ["toy.r", "greater than 0"]),
        ("1e-4", "fast", ["toy.learning_rate", "number"]),
        ("1e-4", ".inf", ["toy.learning_rate", "finite"]),
        ("1e-4", ".nan", ["toy.learning_rate", "finite"]),
        ("packing: false", "packing: no thanks", ["toy.packing", "boolean"]),
        ("packing: false", "packing: 0", ["toy.packing", "boolean"]),
        ("toy:", "train:", ["no section 'toy'"]),
        ("r: 16", "r: [16", ["line 3", "not valid YAML"]),
        ("packing", "r: 8\n  packing", ["line 4", "not valid YAML"]),
    ],
)
def test_a_wrong_parameter_is_one_sentence_that_names_it(tmp_path: Path, old: str, new: str, words: list[str]):
    assert old in GOOD
    with pytest.raises(Fail) as failure:
        load(tmp_path, GOOD.replace(old, new))
    assert "\n" not in str(failure.value)
    for word in ["params.yaml", *words]:
        assert word in str(failure.value)


def test_every_wrong_parameter_is_named_at_once(tmp_path: Path):
    with pytest.raises(Fail, match=r"toy\.r.*toy\.packing.*toy\.rank"):
        load(tmp_path, "toy:\n  r: 0\n  rank: 1\n  learning_rate: 1\n")


@pytest.mark.parametrize("text", ["", "- toy", "toy", "toy:\n", "toy: 3\n"])
def test_a_file_without_the_section(tmp_path: Path, text: str):
    with pytest.raises(Fail, match="no section 'toy'"):
        load(tmp_path, text)


def test_no_params_file():
    with pytest.raises(Fail, match=r"params\.yaml is not in this directory"):
        Toy.load("toy")


def test_parameters_cannot_change(tmp_path: Path):
    params = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        params.r = 8  # pyright: ignore[reportAttributeAccessIssue]


def fill(path: Path, text: str, directory: bool) -> None:
    if directory:
        path.mkdir()
        path /= "part"
    path.write_text(text)


def content(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
class TestWriting:
    def test_success_replaces_and_leaves_nothing_else(self, tmp_path: Path, directory: bool):
        target = tmp_path / "quite" / "new" / "output"
        for text in ("first", "second"):
            with writing(target) as partial:
                assert partial.parent == target.parent  # so that the rename stays on one file system
                fill(partial, text, directory)
                assert not target.exists() or content(target) == "first"
            assert content(target) == text
            assert list(target.parent.iterdir()) == [target]

    def test_failure_leaves_the_old_output(self, tmp_path: Path, directory: bool):
        target = tmp_path / "output"
        fill(target, "old", directory)
        with pytest.raises(ZeroDivisionError), writing(target) as partial:  # noqa: PT012  # it fails half way
            fill(partial, "half", directory)
            raise ZeroDivisionError
        assert content(target) == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_writing_nothing_leaves_the_old_output(self, tmp_path: Path, directory: bool):
        target = tmp_path / "output"
        fill(target, "old", directory)
        with pytest.raises(FileNotFoundError), writing(target):
            pass
        assert content(target) == "old"

    def test_what_a_killed_run_left_is_removed(self, tmp_path: Path, directory: bool):
        target = tmp_path / "output"
        with scratch(target) as name:
            pass
        fill(name, "left over", not directory)
        with writing(target) as partial:
            assert partial == name
            assert not partial.exists()
            fill(partial, "new", directory)
        assert list(tmp_path.iterdir()) == [target]


def test_scratch_never_becomes_an_output(tmp_path: Path):
    with scratch(tmp_path / "wide.gguf") as partial:
        partial.write_text("temporary")
        assert partial.name.startswith(".")
        assert partial.name.endswith(".partial")  # what .gitignore names
    assert list(tmp_path.iterdir()) == []


def test_fail_becomes_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch):
    def main() -> None:
        raise Fail("the sentence")

    monkeypatch.setattr("sys.argv", ["toy"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == "test_stage: the sentence"  # python prints a string and exits with 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), "x.json: No space left on device; free disk"),
        (OSError(errno.EROFS, "Read-only file system"), "an output: Read-only file system; free disk"),
        (RuntimeError("PytorchStreamWriter failed writing file"), r"could not be written \(Pytorch.* free disk"),
    ],
)
def test_a_full_or_read_only_disk_becomes_one_too(monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str):
    def main() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["toy"])
    with pytest.raises(SystemExit, match=f"test_stage: .*{sentence}"):
        run(main)


@pytest.mark.parametrize("error", [KeyError("a bug"), ConnectionResetError(errno.ECONNRESET, "reset")])
def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def main() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["toy"])
    with pytest.raises(type(error)):
        run(main)


STAGE = """
import time
from pathlib import Path
from pipeline.core import stage

def main(seconds: float):
    Path("started").touch()
    time.sleep(seconds)

stage.LOCK_TRIES = 5
stage.run(main)
"""


def start(directory: Path, seconds: str, **environment: str) -> subprocess.Popen[str]:
    """A process that is a stage for so many seconds."""
    return subprocess.Popen(
        [sys.executable, "toy.py", seconds],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_second_stage_runs_in_a_directory_under_dvc(tmp_path: Path):
    (tmp_path / "toy.py").write_text(STAGE)
    with start(tmp_path, "60", DVC_STAGE="toy") as first:
        while not (tmp_path / "started").exists():
            assert first.poll() is None
            time.sleep(0.01)
        second = start(tmp_path, "0", DVC_STAGE="toy")
        assert "another run of this pipeline is still at work in this directory" in second.communicate()[1]
        assert second.returncode == 1
        assert start(tmp_path, "0").wait() == 0  # started by hand: what it does is its user's matter
        first.kill()
    assert start(tmp_path, "0", DVC_STAGE="toy").wait() == 0


@pytest.mark.parametrize("of_dvc", [True, False])
def test_a_stage_whose_dvc_was_killed_before_it_began_does_not_begin(tmp_path: Path, of_dvc: bool):
    """An orphan has another parent by the time Python is there, and no signal will come from that one."""
    (tmp_path / "toy.py").write_text(STAGE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"DVC_STAGE": "toy"} if of_dvc else {})}
    orphan = ["sh", "-c", f"(sleep 0.3; exec {sys.executable} toy.py 0) &"]
    # The output is at its end when the orphan is at its own.
    subprocess.run(
        orphan, cwd=tmp_path, env=environment, start_new_session=True, capture_output=True, timeout=60, check=True
    )
    assert (tmp_path / "started").exists() != of_dvc


def test_a_copy_of_dvc_lock_is_kept_as_the_stage_found_it(tmp_path: Path):
    (tmp_path / "toy.py").write_text(STAGE)
    assert start(tmp_path, "0", DVC_STAGE="toy").wait() == 0
    assert not (tmp_path / ".dvc").exists()
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    for text in ("first", "second"):
        (tmp_path / "dvc.lock").write_text(text)
        assert start(tmp_path, "0", DVC_STAGE="toy").wait() == 0
        assert (tmp_path / ".dvc" / "tmp" / "dvc.lock").read_text() == text
    assert [path.name for path in (tmp_path / ".dvc" / "tmp").iterdir()] == ["dvc.lock"]


def test_a_python_outside_any_environment_goes_on_with_the_projects_own(tmp_path: Path):
    """What `.venv/bin/dvc repro` without activation comes down to."""
    (tmp_path / "pipeline").mkdir()
    shutil.copyfile(pipeline.__file__, tmp_path / "pipeline" / "__init__.py")
    (tmp_path / "pipeline" / "which.py").write_text("import sys; print(sys.prefix, *sys.argv[1:])")
    venv.create(tmp_path / ".venv", symlinks=True)
    system = Path(sys.base_prefix, "bin", "python3")
    done = subprocess.run([system, "-m", "pipeline.which", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / '.venv'} a b\n"


def sentences() -> list[tuple[str, str]]:
    """Where, and how, each `Fail` of the pipeline is raised."""
    found: list[tuple[str, str]] = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Fail":
                found.append((f"{path.name}:{node.lineno}", ast.get_source_segment(source, node.args[0]) or ""))
    return found


# Another sentence with a place before it, and a verdict.
BUILT = ["judgement.sentence", """f"{test}, PMID {row['pmid']}: {error}\""""]
STEPS = (
    r"\b(run|correct|lower|raise|set|give|free|choose|put|install|check|compare|accept|convert|make|git diff"
    r"|AGAIN|AND_AGAIN|ABSURD|again|needs|write)\b"
)


def test_every_error_says_what_to_do_next():
    assert len(sentences()) > 60
    without = [where for where, text in sentences() if text not in BUILT and not re.search(STEPS, text)]
    assert not without
