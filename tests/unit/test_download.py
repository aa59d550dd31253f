"""Fetching: checked, retried a bounded number of times, and never half a file under the final name."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Fail
from pipeline.core.source import Source
from pipeline.sections.download import File
from pipeline.stages.download import ATTEMPTS, fetch, main, retry_after
from tests.hub import Answer, Server, serve

BODY = b"every byte of the file\n" * 5000
FILE = File(name="ori_pqal.json", sha256=hashlib.sha256(BODY).hexdigest())
PATH = "/a@b/ori_pqal.json"
GOOD, TRUNCATED, RESET = Answer(200, BODY), Answer(200, BODY, sent=1000), Answer(reset=True)
STALLED = Answer(200, BODY, sent=1000, stall=1.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("pipeline.stages.download.TIMEOUT", 0.3)
    with serve() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `download` would have slept."""
    waited: list[float] = []
    monkeypatch.setattr("pipeline.stages.download.time.sleep", waited.append)
    return waited


def moved(location: str, **options: Any) -> Answer:
    return Answer(302, headers={"Location": location}, **options)


def headed(status: int, name: str, value: str, **options: Any) -> Answer:
    return Answer(status, BODY, {name: value}, **options)


# What the server answers, and the seconds that are waited.
PASSING: dict[str, tuple[list[Answer], list[int]]] = {
    "none": ([GOOD], []),
    "500 and 503": ([Answer(500), Answer(503), GOOD], [1, 2]),
    "truncated": ([TRUNCATED, GOOD], [1]),
    "connection reset": ([RESET, RESET, RESET, RESET, GOOD], [1, 2, 4, 8]),
    "429": ([headed(429, "Retry-After", "7"), Answer(429), GOOD], [7, 2]),
    "stalled": ([STALLED, GOOD], [1]),
    "redirect": ([moved("/elsewhere")], []),
    "a length that is no number": ([headed(200, "Content-Length", "many"), GOOD], [1]),
    "compressed": ([Answer(200, gzip.compress(BODY), {"Content-Encoding": "gzip"})], []),
    "a compression that is none": ([headed(200, "Content-Encoding", "gzip"), GOOD], [1]),
}


@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_pass_end_in_the_right_file(server: Server, waits: list[float], tmp_path: Path, fault: str):
    answers, waited = PASSING[fault]
    server.answers |= {"/elsewhere": [GOOD], PATH: answers.copy()}
    fetch(f"{server.url}/a@b/", FILE, tmp_path / "raw.json")
    assert (tmp_path / "raw.json").read_bytes() == BODY
    assert waits == waited
    assert [path.name for path in tmp_path.iterdir()] == ["raw.json"]


# What the server always answers, how often it is asked, and what is said of it.
STAYING: dict[str, tuple[Answer, int, str]] = {
    "404": (Answer(404), 1, "HTTP 404"),
    "500": (Answer(500), ATTEMPTS, "HTTP 500"),
    "429": (headed(429, "Retry-After", "1"), ATTEMPTS, "HTTP 429"),
    "truncated": (TRUNCATED, ATTEMPTS, "could not be downloaded"),
    "reset": (RESET, ATTEMPTS, "ConnectionError"),
    "stalled": (STALLED, ATTEMPTS, "could not be downloaded"),
    "a byte too few": (Answer(200, BODY[:-1]), 1, f"sha256 .* expects {FILE.sha256}"),
    "other bytes": (Answer(200, BODY[::-1]), 1, "sha256"),
    "empty": (Answer(200, b""), 1, "sha256"),
    "a length too long": (headed(200, "Content-Length", str(len(BODY) + 9), sent=len(BODY)), ATTEMPTS, "downloaded"),
    "a length of thousands of digits": (headed(200, "Content-Length", "9" * 5000), ATTEMPTS, "downloaded"),
    "redirected in a circle": (moved(PATH), 31 * ATTEMPTS, "TooManyRedirects"),
    "redirected to no web server": (moved("ftp://elsewhere"), ATTEMPTS, "InvalidSchema"),
    "redirected to no UTF-8": (moved("/\xff\xfe"), ATTEMPTS, "UnicodeDecodeError"),
    "redirected to half an address": (moved("http://[/"), ATTEMPTS, "ValueError"),
    "redirected to no name": (moved("http://.x/"), ATTEMPTS, "LocationParseError"),
    "a part that nobody asked for": (headed(206, "Content-Range", "bytes 0-9/9"), 1, "HTTP 206"),
}


@pytest.mark.parametrize("fault", STAYING)
@pytest.mark.usefixtures("waits")
def test_faults_that_stay_end_in_one_sentence_without_a_password(server: Server, tmp_path: Path, fault: str):
    answer, tries, problem = STAYING[fault]
    server.answers[PATH] = [answer]
    target = tmp_path / "raw.json"
    target.write_text("old")
    with pytest.raises(Fail, match=problem) as failure:
        fetch(server.url.replace("://", "://reader:se:c@ret@") + "/a@b", FILE, target)
    said = str(failure.value)
    assert (said.isprintable(), f"{server.url}/a@b" in said, "ret@" in said) == (True, True, False)
    assert server.count(PATH) == tries
    assert (target.read_text(), list(tmp_path.iterdir())) == ("old", [target])


def test_a_server_that_is_gone_is_tried_a_bounded_number_of_times(tmp_path: Path, waits: list[float]):
    with serve() as gone:
        pass
    with pytest.raises(Fail, match="check the network"):
        fetch(gone.url, FILE, tmp_path / "raw.json")
    assert waits == [1, 2, 4, 8]


HEADERS = {"": 4, "soon": 4, "-1": 4, "²": 4, "Fri, 31 Dec 2199 23:59:59 GMT": 4, "0": 0, "30": 30, "9" * 400: 60}


@pytest.mark.parametrize("header", HEADERS)
def test_retry_after_is_obeyed_up_to_a_minute(header: str):
    assert retry_after(header, default=4) == HEADERS[header]


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with both files, and a params.yaml that names it in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "ori_pqal.json").write_bytes(BODY)
    (tmp_path / "mirror" / "list.json").write_bytes(b"{}")
    truth = {"name": "list.json", "sha256": hashlib.sha256(b"{}").hexdigest()}
    values = {"source": "files", "location": "mirror", "records": FILE.model_dump(), "test_ground_truth": truth}
    (tmp_path / "params.yaml").write_text(json.dumps({"download": values}))  # JSON is YAML
    return tmp_path / "mirror"


@pytest.mark.usefixtures("mirror")
def test_only_the_published_file_is_called_pubmedqa(monkeypatch: pytest.MonkeyPatch):
    for sha256, dataset in (("0" * 64, ""), (FILE.sha256, "qiaojin/PubMedQA")):
        monkeypatch.setattr("pipeline.stages.download.PUBMEDQA_SHA256", sha256)
        main(Path("raw"))
        source = Source.model_validate_json(Path("raw/source.json").read_text())
        assert (source.dataset, source.test_ground_truth) == (dataset, "list.json")


@pytest.mark.parametrize("body", ["{} ", None], ids=["altered", "missing"])
def test_with_one_file_wrong_the_old_ones_stay(mirror: Path, body: str | None):
    main(Path("raw"))
    before = {path.name: path.read_bytes() for path in Path("raw").iterdir()}
    (mirror / "list.json").unlink()
    if body:
        (mirror / "list.json").write_text(body)
    with pytest.raises(Fail, match=r"list\.json"):
        main(Path("raw"))
    assert {path.name: path.read_bytes() for path in Path("raw").iterdir()} == before


def test_an_address_that_is_taken_for_a_directory_is_named_without_its_password(tmp_path: Path):
    with pytest.raises(Fail, match=r"^ftp:/mirror/data/ori_pqal\.json is missing"):
        fetch("ftp://reader:secret@mirror/data", FILE, tmp_path / "raw.json")
