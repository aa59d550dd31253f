"""Fetching: checked, retried a bounded number of times, and never half a file under the final name."""

import gzip
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from pipeline.core.stage import Fail
from pipeline.stages.download import (
    ATTEMPTS,
    Artificial,
    File,
    artificial_records,
    fetch,
    load_params,
    main,
    retry_after,
)
from tests.conftest import ROOT, run_command, tried
from tests.hub import COMMIT, Answer, Server, serve

BODY = b"every byte of the file\n" * 5000
FILE = File(name="ori_pqal.json", sha256=hashlib.sha256(BODY).hexdigest())
GOOD = Answer(200, BODY)
TRUNCATED = Answer(200, BODY, sent=1000)
RESET = Answer(reset=True)
STALLED = Answer(200, BODY, sent=1000, stall=1.0)
WHOLE = {"Content-Length": str(len(BODY))}
MOVED = Answer(302, headers={"Location": "/elsewhere"})
MOVED_AND_CUT = Answer(302, BODY, {"Location": "/elsewhere", "Content-Encoding": "gzip"}, sent=10)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `download` would have slept."""
    waited: list[float] = []
    monkeypatch.setattr("pipeline.stages.download.time.sleep", waited.append)
    return waited


@pytest.mark.parametrize(
    ("answers", "waited"),
    [
        ([GOOD], []),
        ([Answer(500), Answer(503), GOOD], [1, 2]),
        ([TRUNCATED, GOOD], [1]),
        ([RESET, RESET, RESET, RESET, GOOD], [1, 2, 4, 8]),
        ([Answer(429, headers={"Retry-After": "7"}), Answer(429), GOOD], [7, 2]),
        ([Answer(429, headers={"Retry-After": "9999"}), GOOD], [60]),
        ([Answer(503, headers={"Retry-After": "²"}), GOOD], [1]),
        ([STALLED, GOOD], [1]),
        ([MOVED], []),
        ([MOVED_AND_CUT, GOOD], [1]),
        ([Answer(200, BODY, {"Content-Length": "many"}), GOOD], [1]),
        ([Answer(200, BODY, {"Content-Encoding": "gzip"}), GOOD], [1]),
    ],
    ids=[
        "at once",
        "500 and 503",
        "truncated",
        "connection reset",
        "429",
        "429 for hours",
        "503 for a digit that is no number",
        "stalled",
        "redirect",
        "a redirect cut short",
        "a length that is no number",
        "a compression that is none",
    ],
)
def test_faults_that_pass(
    server: Server,
    waits: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    answers: list[Answer],
    waited: list[float],
):
    monkeypatch.setattr("pipeline.stages.download.TIMEOUT", 0.5)
    server.answers["/elsewhere"] = [GOOD]
    server.answers["/mirror/ori_pqal.json"] = answers.copy()
    with tried("downloads", f"data: {request.node.callspec.id}, for a while") as seen:
        fetch(f"{server.url}/mirror/", FILE, tmp_path / "raw.json")
        assert (tmp_path / "raw.json").read_bytes() == BODY
        seen.append("the right file")
    assert waits == waited
    assert [path.name for path in tmp_path.iterdir()] == ["raw.json"]


@pytest.mark.parametrize(
    ("answer", "tries", "problem"),
    [
        (Answer(404), 1, "HTTP 404"),
        (Answer(403), 1, "HTTP 403"),
        (Answer(500), ATTEMPTS, f"in {ATTEMPTS} tries .*HTTP 500"),
        (TRUNCATED, ATTEMPTS, f"in {ATTEMPTS} tries"),
        (RESET, ATTEMPTS, f"in {ATTEMPTS} tries .*ConnectionError"),
        (Answer(200, BODY[:-1]), 1, f"ori_pqal.json from .* has sha256 .* expects {FILE.sha256}"),
        (Answer(200, b""), 1, "has sha256"),
        (Answer(429, headers={"Retry-After": "1"}), ATTEMPTS, f"in {ATTEMPTS} tries .*HTTP 429"),
        (STALLED, ATTEMPTS, f"in {ATTEMPTS} tries"),
        (Answer(200, BODY, {"Content-Length": str(len(BODY) - 9)}), 1, "has sha256"),
        (Answer(200, BODY, {"Content-Length": str(len(BODY) + 9)}, sent=len(BODY)), ATTEMPTS, f"in {ATTEMPTS} tries"),
        (Answer(302, headers={"Location": "/ori_pqal.json"}), 31 * ATTEMPTS, "TooManyRedirects"),
        (Answer(302, headers={"Location": "ftp://elsewhere"}), ATTEMPTS, "InvalidSchema"),
        (Answer(302, headers={"Location": "/\xff\xfe"}), ATTEMPTS, f"in {ATTEMPTS} tries .*UnicodeDecodeError"),
        (Answer(302, headers={"Location": "http://[/"}), ATTEMPTS, f"in {ATTEMPTS} tries .*ValueError"),
        (Answer(302, headers={"Location": "http://.x/"}), ATTEMPTS, f"in {ATTEMPTS} tries .*LocationParseError"),
        (Answer(200, BODY, {"Content-Length": "9" * 5000}), ATTEMPTS, f"in {ATTEMPTS} tries"),
        (Answer(206, BODY[7:], {"Content-Range": f"bytes 0-9/{len(BODY)}"}), 1, "HTTP 206"),
        (Answer(200, BODY[::-1]), 1, "has sha256"),
    ],
    ids=[
        "404",
        "403",
        "500",
        "truncated",
        "reset",
        "wrong sha256",
        "empty",
        "429",
        "stalled",
        "a length too short",
        "a length too long",
        "redirected in a circle",
        "redirected to no web server",
        "redirected to no UTF-8",
        "redirected to half an address",
        "redirected to no name",
        "a length of thousands of digits",
        "a part that nobody asked for",
        "wrong bytes",
    ],
)
@pytest.mark.usefixtures("waits")
def test_faults_that_stay(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    answer: Answer,
    tries: int,
    problem: str,
):
    monkeypatch.setattr("pipeline.stages.download.TIMEOUT", 0.2)
    server.answers["/ori_pqal.json"] = [answer]
    target = tmp_path / "raw.json"
    target.write_text("old")
    with tried("downloads", f"data: {request.node.callspec.id}, always") as seen:
        with pytest.raises(Fail, match=problem) as failure:
            fetch(server.url, FILE, target)
        assert "\n" not in str(failure.value)
        assert server.count("/ori_pqal.json") == tries
        assert target.read_text() == "old"
        seen.append(str(failure.value).replace(server.url, "http://mirror"))
    assert list(tmp_path.iterdir()) == [target]


def test_a_compressed_answer_has_another_length(server: Server, tmp_path: Path):
    server.answers["/ori_pqal.json"] = [Answer(200, gzip.compress(BODY), {"Content-Encoding": "gzip"})]
    fetch(server.url, FILE, tmp_path / "raw.json")
    assert (tmp_path / "raw.json").read_bytes() == BODY


def test_no_server(tmp_path: Path, waits: list[float]):
    with serve() as gone:
        pass
    with pytest.raises(Fail, match=r"could not be downloaded in 5 tries .*; check the network"):
        fetch(gone.url, FILE, tmp_path / "raw.json")
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 4),
        ("", 4),
        ("soon", 4),
        ("-1", 4),
        ("²", 4),
        ("Fri, 31 Dec 2199 23:59:59 GMT", 4),
        ("0", 0),
        ("30", 30),
        ("9" * 400, 60),
    ],
)
def test_retry_after(header: str | None, seconds: float):
    assert retry_after(header, otherwise=4) == seconds


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (Answer(404), r"^http://127\.0\.0\.1:\d+/a@b/ori_pqal\.json answered HTTP 404"),
        (Answer(500), r"^http://127\.0\.0\.1:\d+/a@b/ori_pqal\.json could not be downloaded"),
        (Answer(200, b""), r"^ori_pqal\.json from http://127\.0\.0\.1:\d+/a@b has sha256"),
    ],
    ids=["404", "500", "wrong sha256"],
)
@pytest.mark.usefixtures("waits")
def test_no_sentence_holds_a_mirror_s_password(server: Server, tmp_path: Path, answer: Answer, sentence: str):
    server.answers["/a@b/ori_pqal.json"] = [answer]
    location = server.url.replace("://", "://reader:se:c@ret@") + "/a@b"
    with pytest.raises(Fail, match=sentence):
        fetch(location, FILE, tmp_path / "raw.json")


def test_nor_does_one_of_an_address_that_is_taken_for_a_directory(tmp_path: Path):
    with pytest.raises(Fail, match=r"^ftp:/mirror/data/ori_pqal\.json is missing"):
        fetch("ftp://reader:secret@mirror/data", FILE, tmp_path / "raw.json")


def test_a_mirror_directory(tmp_path: Path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with pytest.raises(Fail, match=r"mirror/ori_pqal.json is missing; put it there"):
        fetch(str(mirror), FILE, tmp_path / "raw.json")
    (mirror / "ori_pqal.json").write_bytes(BODY)
    fetch(str(mirror), FILE, tmp_path / "raw.json")
    assert (tmp_path / "raw.json").read_bytes() == BODY
    (mirror / "ori_pqal.json").write_bytes(BODY + b" ")
    with pytest.raises(Fail, match="has sha256"):
        fetch(str(mirror), FILE, tmp_path / "raw.json")
    assert (tmp_path / "raw.json").read_bytes() == BODY


def params(directory: Path, **changes: Any) -> None:
    values = {
        "source": "files",
        "location": str(directory / "mirror"),
        "records": FILE.model_dump(),
        "test_ground_truth": {"name": "test_ground_truth.json", "sha256": hashlib.sha256(b"{}").hexdigest()},
        "pqa_artificial": None,
    }
    (directory / "params.yaml").write_text(json.dumps({"download": values | changes}))  # JSON is YAML


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of both files, and a params.yaml that names it in the current directory."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "mirror"
    directory.mkdir()
    (directory / "ori_pqal.json").write_bytes(BODY)
    (directory / "test_ground_truth.json").write_text("{}")
    params(tmp_path)
    return directory


def test_both_files_or_nothing(mirror: Path, tmp_path: Path):
    raw = tmp_path / "data" / "raw"
    main(raw)
    assert sorted(path.name for path in raw.iterdir()) == ["ori_pqal.json", "source.json", "test_ground_truth.json"]
    assert json.loads((raw / "source.json").read_text())["simulated"] is False
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    (mirror / "test_ground_truth.json").write_text("{} ")
    with pytest.raises(Fail, match=r"test_ground_truth.json .* has sha256"):
        main(raw)
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == before
    assert list(raw.parent.iterdir()) == [raw]


@pytest.mark.usefixtures("mirror")
def test_only_the_published_file_is_called_pubmedqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    main(tmp_path / "raw")
    source = json.loads((tmp_path / "raw" / "source.json").read_text())
    assert source == {"simulated": False, "name": "own data", "licence": "its own"}
    monkeypatch.setattr("pipeline.stages.download.PUBMEDQA_SHA256", FILE.sha256)
    main(tmp_path / "raw")
    source = json.loads((tmp_path / "raw" / "source.json").read_text())
    assert (source["name"], source["dataset"]) == ("PubMedQA PQA-L", "qiaojin/PubMedQA")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"source": "web"}, "download.source: 'web' is not one of files, simulated"),
        ({"records": {"name": "a.json"}}, "download.records.sha256"),
        ({"records": {"name": "a.json", "sha256": "8B" * 32}}, "download.records.sha256"),
        ({"records": {"name": "../a.json", "sha256": "8b" * 32}}, "download.records.name"),
        ({"pqa_artificial": {"repo_id": "o/n", "revision": "main"}}, "download.pqa_artificial.revision"),
        ({"pqa_artificial": {"repo_id": "o", "revision": COMMIT}}, "download.pqa_artificial.repo_id"),
        ({"pqa_artificial": {"repo_id": "o/n", "revision": COMMIT, "seed": -1}}, "download.pqa_artificial.seed"),
        ({"seed": 1}, "download.seed"),
    ],
)
@pytest.mark.usefixtures("mirror")
def test_parameters(tmp_path: Path, changes: dict[str, Any], place: str):
    params(tmp_path, **changes)
    with pytest.raises(Fail) as failure:
        load_params()
    assert place in str(failure.value)


ROWS = [
    {
        "pubid": 5000 + i,
        "question": f"Question {i}",
        "context": {
            "contexts": [f"first of {i}", f"second of {i}"],
            "labels": ["METHODS", "RESULTS"],
            "meshes": ["Mesh"],
            "reasoning_required_pred": ["S", "E", "N", "T", "I", "N", "E", "L"],
            "reasoning_free_pred": ["S", "E", "N", "T", "I", "N", "E", "L"],
        },
        "long_answer": f"Answer {i}",
        "final_decision": "no" if i % 3 else "yes",
    }
    for i in range(8)
]


def parquet(directory: Path, columns: dict[str, Any]) -> bytes:
    """A parquet file of these columns."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "x.parquet")
    return (directory / "x.parquet").read_bytes()


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
CONTEXTS = COLUMNS["context"]


@pytest.mark.usefixtures("mirror")
class TestArtificial:
    """PQA-A from a hub, in its parquet schema: the context field holds more than contexts and labels."""

    def run(self, server: Server, directory: Path, body: bytes, **about: Any):
        server.add_repository("org/PubMedQA", {"pqa_artificial/x.parquet": body}, "datasets")
        file = {"name": "x.parquet", "sha256": hashlib.sha256(body).hexdigest()}
        values = {"repo_id": "org/PubMedQA", "revision": COMMIT, "file": file, "questions": 5, "seed": 1}
        params(directory, pqa_artificial=values | about)
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(directory / "home"), "PYTHONPATH": str(ROOT)}
        return run_command(directory, "python3 -m pipeline.stages.download raw", **environment)

    def test_contexts_and_labels_and_nothing_else(self, server: Server, tmp_path: Path):
        result = self.run(server, tmp_path, parquet(tmp_path, COLUMNS))
        assert result.returncode == 0, result.stderr
        records = json.loads((tmp_path / "raw" / "ori_pqaa.json").read_text())
        assert sorted(records) == ["5000", "5001", "5002", "5004", "5005"]  # what `datasets` draws by this seed
        rows = {str(row["pubid"]): row for row in ROWS}
        assert records == {
            pmid: {
                "QUESTION": rows[pmid]["question"],
                "CONTEXTS": rows[pmid]["context"]["contexts"],
                "LABELS": rows[pmid]["context"]["labels"],
                "LONG_ANSWER": rows[pmid]["long_answer"],
                "final_decision": rows[pmid]["final_decision"],
            }
            for pmid in records
        }
        assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["hub"]  # the file, and no copy of it

    def test_what_can_go_wrong(self, server: Server, tmp_path: Path):
        body = parquet(tmp_path, COLUMNS)
        other = {"file": {"name": "x.parquet", "sha256": "0" * 64}}
        for result, problem in (
            (self.run(server, tmp_path, body, questions=9), "download.pqa_artificial.questions: .* holds only 8"),
            (self.run(server, tmp_path, body, **other), "x.parquet from org/PubMedQA has sha256"),
        ):
            assert result.returncode == 1
            assert re.search(problem, result.stderr.splitlines()[-1])
            assert "Traceback" not in result.stderr
            assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "ArrowInvalid"),
        (b"PAR1" + bytes(20) + b"\x05\0\0\0PAR1", "OSError"),  # a footer that is none
        ({"pubid": None}, "pubid: Field required"),
        ({"date": numpy.array([10**18] * 8, "datetime64[us]")}, "OverflowError"),
        ({"pubid": [str(5000 + i) for i in range(8)]}, "pubid: Input should be a valid integer"),
        ({"question": [7] * 8}, "question: Input should be a valid string"),
        ({"question": [None] * 8}, "question: Input should be a valid string"),
        ({"context": ["words"] * 8}, "context: Input should be .*"),
        ({"context": [{"contexts": row["contexts"]} for row in CONTEXTS]}, r"context\.labels: Field required"),
        (
            {"context": [row | {"labels": "words"} for row in CONTEXTS]},
            r"context\.labels: Input should be a valid list",
        ),
        ({"final_decision": [True] * 8}, "final_decision: Input should be a valid string"),
    ],
    ids=[
        "a pointer",
        "no footer",
        "no identifiers",
        "a date of no calendar",
        "identifiers as text",
        "numbers for questions",
        "no question",
        "text for contexts",
        "no labels",
        "text for labels",
        "true or false",
    ],
)
def test_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: bytes | dict[str, Any], problem: str):
    if isinstance(table, dict):
        table = parquet(tmp_path, {name: column for name, column in (COLUMNS | table).items() if column is not None})
    (tmp_path / "x.parquet").write_bytes(table)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "x.parquet"))
    file = File(name="x.parquet", sha256=hashlib.sha256(table).hexdigest())
    with pytest.raises(Fail) as failure:
        artificial_records(Artificial(repo_id="org/PubMedQA", revision=COMMIT, file=file, questions=5, seed=1))
    place = r"pqa_artificial/x\.parquet of org/PubMedQA is no table as PQA-A's is"
    assert re.fullmatch(rf"{place} \({problem}\); check download\.pqa_artificial\.file", str(failure.value))


def test_the_server_is_silent_on_a_client_that_hangs_up_alone(server: Server, capsys: pytest.CaptureFixture[str]):
    def ask(path: str, patient: bool) -> str:
        """What the server prints on a request whose client reads the answer's end, or resets the connection."""
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            client.recv(10)
            if not patient:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for thread in threading.enumerate():
            if "process_request" in thread.name:
                thread.join(10)
        return capsys.readouterr().err

    server.answers |= {"/large": [Answer(200, bytes(1 << 25))], "/broken": []}
    assert ask("/large", patient=False) == ""
    assert "IndexError" in ask("/broken", patient=True)
