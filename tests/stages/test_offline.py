"""No stage, and no DVC, asks for anything outside this machine when the base is present; no question leaves data/."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ALONE, ROOT, alone_possible, copy_project, run_command, tried


def test_the_watch_sees_look_ups_connections_and_datagrams_of_python_and_of_native_code(watch: Path, tmp_path: Path):
    notes = tmp_path / "notes"
    program = """
import socket
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    socket.socket(family).connect_ex((address, 9))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.sendto(b"", ("127.0.0.2", 9))
datagrams.sendmsg([b""], [], 0, ("127.0.0.3", 9))
socket.getaddrinfo("localhost", 9)
"""
    (tmp_path / "program.py").write_text(program)
    watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(notes)}
    assert run_command(tmp_path, "python3 program.py", **watched).returncode == 0
    run_command(tmp_path, "git ls-remote http://127.0.0.4:9", **watched)
    calls = {line.partition(" (")[0] for line in notes.read_text().splitlines()}
    assert calls >= {
        "connect 127.0.0.1",
        "connect ::1",
        "sendto 127.0.0.2",
        "sendmsg 127.0.0.3",
        "getaddrinfo localhost",
        "connect 127.0.0.4",
    }


def test_no_stage_looks_up_or_connects_to_anything(micro: Path):
    assert "preload" not in (micro.parent / "printed").read_text()  # the loader only warns
    notes = micro.parent / "connects"
    assert not notes.exists(), notes.read_text()


@pytest.mark.skipif(not alone_possible, reason="this machine lends no network namespace")
@pytest.mark.parametrize(
    "targets",
    ["download format", pytest.param("", marks=pytest.mark.slow)],
    ids=["download and format", "everything"],
)
def test_a_run_in_a_network_namespace_of_its_own(micro: Path, watch: Path, tmp_path: Path, targets: str):
    project = copy_project(tmp_path / "project")
    shutil.copyfile(ROOT / ".gitignore", project / ".gitignore")
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    if targets:
        shutil.copytree(micro / "models" / "base", project / "models" / "base")
    single = "--single-item" if targets else ""
    with tried("offline", f"dvc repro {targets or 'of everything'}, without a network") as seen:
        watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(tmp_path / "notes")}
        result = run_command(project, f"{ALONE} python3 -m dvc repro {single} {targets}", **watched)
        assert result.returncode == 0, result.stderr
        assert not (tmp_path / "notes").exists(), (tmp_path / "notes").read_text()
        if not targets:
            for name in ("models/medical-reasoner.gguf", "metrics/compare.json"):
                assert (project / name).read_bytes() == (micro / name).read_bytes()
        seen.append("nothing: it runs, and no process looks up or connects to anything")


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
