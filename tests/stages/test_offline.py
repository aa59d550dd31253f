"""No stage, and no DVC, asks for anything outside this machine when the base is present; no question leaves data/."""

from pathlib import Path

from tests.conftest import run_command, stages
from tests.stages.helpers import numbers

PROGRAM = """
import socket
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    socket.socket(family).connect_ex((address, 9))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.sendto(b"", ("127.0.0.2", 9))
datagrams.sendmsg([b""], [], 0, ("127.0.0.3", 9))
socket.getaddrinfo("localhost", 9)
"""


def test_the_watch_sees_look_ups_connections_and_datagrams_of_python_and_of_native_code(
    watch: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    (tmp_path / "program.py").write_text(PROGRAM)
    watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(notes)}
    assert run_command(tmp_path, "python3 program.py", **watched).returncode == 0
    run_command(tmp_path, "git ls-remote http://127.0.0.4:9", **watched)
    calls = {line.partition(" (")[0] for line in notes.read_text().splitlines()}
    one = {"connect 127.0.0.1", "connect ::1", "sendto 127.0.0.2", "sendmsg 127.0.0.3"}
    assert calls >= one | {"getaddrinfo localhost", "connect 127.0.0.4"}


def test_no_process_of_a_run_looks_up_or_connects_to_anything_and_none_needs_a_network(micro: Path) -> None:
    assert "preload" not in (micro.parent / "printed").read_text()  # the loader only warns
    notes = micro.parent / "connects"
    assert not notes.exists(), notes.read_text()  # and it ran in a network namespace of its own where that is possible


def test_the_first_stages_alone_look_up_and_connect_to_nothing(project: Path, watch: Path) -> None:
    notes = project / "notes"
    for stage in ("download", "format"):
        watched = {"LD_PRELOAD": str(watch), "CONNECTS": str(notes)}
        assert run_command(project, stages(project)[stage]["cmd"], **watched).returncode == 0
        assert not notes.exists(), notes.read_text()


def test_no_question_abstract_or_conclusion_is_printed_or_in_what_is_committed_and_released(micro: Path) -> None:
    records = numbers(micro / "data" / "raw" / "ori_pqal.json").values()
    texts = {text for record in records for text in (record["QUESTION"], record["LONG_ANSWER"], *record["CONTEXTS"])}
    assert len(texts) > 200
    printed = micro.parent / "printed"
    assert "questions to" in printed.read_text()  # evaluate's progress bar: the stages' output is there
    files = [path for folder in ("metrics", "models/release") for path in (micro / folder).rglob("*") if path.is_file()]
    for path in [printed, *files]:
        body = path.read_text(errors="replace")
        assert [text for text in texts if text in body] == [], path
