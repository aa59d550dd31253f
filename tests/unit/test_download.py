"""Fetching: checked, retried a bounded number of times, and never half a file under the final name."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.download import ATTEMPTS, File, fetch, load_params, main, retry_after
from pipeline.stage import Fail
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


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `download` would have slept."""
    waited: list[float] = []
    monkeypatch.setattr("pipeline.download.time.sleep", waited.append)
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
        ([STALLED, GOOD], [1]),
        ([MOVED], []),
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
        "stalled",
        "redirect",
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
    monkeypatch.setattr("pipeline.download.TIMEOUT", 0.5)
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
    monkeypatch.setattr("pipeline.download.TIMEOUT", 0.2)
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


@pytest.mark.parametrize(("header", "seconds"), [(None, 4), ("", 4), ("soon", 4), ("-1", 4), ("0", 0), ("30", 30)])
def test_retry_after(header: str | None, seconds: float):
    assert retry_after(header, otherwise=4) == seconds


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
    monkeypatch.setattr("pipeline.download.PUBMEDQA_SHA256", FILE.sha256)
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


class TestArtificial:
    """PQA-A from a hub, in its parquet schema: the context field holds more than contexts and labels."""

    @pytest.fixture
    def parquet(self, server: Server, tmp_path: Path) -> bytes:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
        body = (tmp_path / "x.parquet").read_bytes()
        server.add_repository("org/PubMedQA", {"pqa_artificial/x.parquet": body}, "datasets")
        return body

    def run(self, server: Server, directory: Path, sha256: str, questions: int = 5):
        file = {"name": "x.parquet", "sha256": sha256}
        artificial = {"repo_id": "org/PubMedQA", "revision": COMMIT, "file": file, "questions": questions, "seed": 1}
        params(directory, pqa_artificial=artificial)
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(directory / "hub"), "PYTHONPATH": str(ROOT)}
        return run_command(directory, "python3 -m pipeline.download raw", **environment)

    @pytest.mark.usefixtures("mirror")
    def test_contexts_and_labels_and_nothing_else(self, server: Server, tmp_path: Path, parquet: bytes):
        result = self.run(server, tmp_path, hashlib.sha256(parquet).hexdigest())
        assert result.returncode == 0, result.stderr
        records = json.loads((tmp_path / "raw" / "ori_pqaa.json").read_text())
        assert len(records) == 5
        assert set(records) != {str(row["pubid"]) for row in ROWS[:5]}  # drawn, and not the first
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

    @pytest.mark.usefixtures("mirror")
    def test_what_can_go_wrong(self, server: Server, tmp_path: Path, parquet: bytes):
        sha256 = hashlib.sha256(parquet).hexdigest()
        for result, problem in (
            (self.run(server, tmp_path, sha256, questions=9), "download.pqa_artificial.questions: .* holds only 8"),
            (self.run(server, tmp_path, "0" * 64), "x.parquet from org/PubMedQA has sha256"),
        ):
            assert result.returncode == 1
            assert re.search(problem, result.stderr.splitlines()[-1])
            assert "Traceback" not in result.stderr
            assert not (tmp_path / "raw").exists()
