"""No stage, and no DVC, asks for anything outside this machine when the base is present; no question leaves data/."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, copy_project, run_command, tried

ALONE = "unshare -rn"  # a network namespace whose only interface is a loopback that is down
possible = subprocess.run([*ALONE.split(), "true"], capture_output=True, check=False).returncode == 0


def watched(directory: Path, command: str, notes: Path) -> subprocess.CompletedProcess[str]:
    """Run a command; what its Python processes look up or connect to is noted in `notes`."""
    return run_command(directory, command, PYTHONPATH=str(ROOT / "tests" / "connects"), CONNECTS=str(notes))


def test_the_watch_sees_a_look_up_and_a_connection(tmp_path: Path):
    program = "import socket; socket.socket().connect_ex(('127.0.0.1', 9)); socket.getaddrinfo('localhost', 9)"
    watched(tmp_path, f'python3 -c "{program}"', tmp_path / "notes")
    notes = (tmp_path / "notes").read_text()
    assert "socket.connect ('127.0.0.1', 9)" in notes
    assert "socket.getaddrinfo localhost" in notes


@pytest.mark.skipif(not possible, reason="this machine lends no network namespace")
@pytest.mark.parametrize(
    "targets",
    ["download format", pytest.param("", marks=pytest.mark.slow)],
    ids=["download and format", "everything"],
)
def test_a_run_in_a_network_namespace_of_its_own(micro: Path, tmp_path: Path, targets: str):
    project = copy_project(tmp_path / "project")
    shutil.copyfile(ROOT / ".gitignore", project / ".gitignore")
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    if targets:
        shutil.copytree(micro / "models" / "base", project / "models" / "base")
    single = "--single-item" if targets else ""
    with tried("offline", f"dvc repro {targets} without a network"):
        result = watched(project, f"{ALONE} python3 -m dvc repro {single} {targets}", tmp_path / "notes")
        assert result.returncode == 0, result.stderr
        assert not (tmp_path / "notes").exists(), (tmp_path / "notes").read_text()
        if not targets:
            for name in ("models/medical-reasoner.gguf", "metrics/compare.json"):
                assert (project / name).read_bytes() == (micro / name).read_bytes()


def test_no_question_abstract_or_conclusion_is_printed_or_in_what_is_committed_and_released(micro: Path):
    records = json.loads((micro / "data" / "raw" / "ori_pqal.json").read_text())
    texts = {text for record in records.values() for text in (record["QUESTION"], record["LONG_ANSWER"])}
    texts |= {text for record in records.values() for text in record["CONTEXTS"]}
    assert len(texts) > 200
    printed = micro.parent / "printed"
    assert "questions to" in printed.read_text()  # evaluate's progress bar: the stages' output is there
    files = [path for folder in ("metrics", "models/release") for path in (micro / folder).rglob("*") if path.is_file()]
    for path in [printed, *files]:
        body = path.read_text(errors="replace")
        assert not [text for text in texts if text in body], path
