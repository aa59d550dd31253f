"""Download: PubMedQA, a mirror of it, a hospital's own questions or the simulated trials -> data/raw.

Two files in the schema of PQA-L (Jin et al. 2019, https://arxiv.org/abs/1909.06146; https://github.com/pubmedqa/pubmedqa):
ori_pqal.json (PMID -> record) and test_ground_truth.json (PMID -> yes, no or maybe, for the test questions), each
checked against the sha256 in params.yaml. Optionally ori_pqaa.json, artificial questions to train on as well, from the
hub's qiaojin/PubMedQA. source.json says where all of it comes from.
"""

import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError
from tqdm import tqdm

from pipeline.core.records import Record, sha256, write_json
from pipeline.core.stage import Fail, Section, read_section, run, writing
from pipeline.models.weights import from_hub

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without a byte
PUBMEDQA_SHA256 = "8b3276be8942ebbd77f3ddcda12c1749bf0e490045a736fd8438ee40cf37a41d"  # ori_pqal.json at 1cbae8e
PUBMEDQA = {"name": "PubMedQA PQA-L", "dataset": "qiaojin/PubMedQA", "licence": "MIT"}


class File(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    sha256: Sha256


class Artificial(Section):
    """PQA-A: 211,269 questions made from statement titles, 92.8 % yes, 7.2 % no."""

    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    file: File  # a parquet file of the repository's folder pqa_artificial
    questions: Annotated[int, Field(gt=0)]
    seed: Annotated[int, Field(ge=0)]


class Context(BaseModel, strict=True):
    """What is read of PQA-A's context field, which holds more."""

    contexts: list[str]
    labels: list[str]


class Row(BaseModel, strict=True):
    """What is read of a row of PQA-A's table."""

    pubid: int
    question: str
    context: Context
    long_answer: str
    final_decision: str


class Files(Section):
    source: Literal["files"]
    location: str  # a URL or a directory that holds both files
    records: File
    test_ground_truth: File
    pqa_artificial: Artificial | None


class Simulated(Section):
    source: Literal["simulated"]
    seed: int
    questions: Annotated[int, Field(ge=20)]  # for training and validation
    test_questions: Annotated[int, Field(ge=20)]


def load_params() -> Files | Simulated:
    """The section `download`, by its `source`."""
    values = read_section("download")
    match values.get("source"):
        case "files":
            return Files.check("download", values)
        case "simulated":
            return Simulated.check("download", values)
        case other:
            raise Fail(f"params.yaml: download.source: {other!r} is not one of files, simulated; set it to one")


def fetch(location: str, file: File, target: Path) -> None:
    """Copy or download `file` from a directory or URL to `target`; raises `Fail` unless its sha256 is the expected."""
    if location.startswith(("https://", "http://")):
        with writing(target) as partial:
            download(f"{location.rstrip('/')}/{file.name}", partial)
            check(partial, file, location)
        return
    origin = Path(location) / file.name
    if not origin.is_file():
        raise Fail(f"{printable(str(origin))} is missing; put it there, or set params.yaml's download.location")
    with writing(target) as partial:
        shutil.copyfile(origin, partial)
        check(partial, file, location)


def check(path: Path, file: File, origin: str) -> None:
    """Raise `Fail` unless the file at `path` has the sha256 that params.yaml expects."""
    if (found := sha256(path)) != file.sha256:
        raise Fail(
            f"{file.name} from {printable(origin)} has sha256 {found}, but params.yaml expects {file.sha256} under "
            "download; if the new file is wanted, write its sha256 there"
        )


def printable(location: str) -> str:
    """The location without the name and password that a URL can hold: errors end up in logs and in issues."""
    return re.sub(r"(\w:/+)[^/]*@", r"\1", location, count=1)


def download(url: str, target: Path) -> None:
    """Download `url`; a lost connection, a short body, 429 and 5xx are tried again, a bounded number of times."""
    import requests
    from requests.exceptions import BaseHTTPError  # pyright: ignore[reportPrivateImportUsage]

    shown, problem = printable(url), ""
    for attempt in range(1, ATTEMPTS + 1):
        wait = 2.0 ** (attempt - 1)
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT) as response:
                if response.status_code == 429 or response.status_code >= 500:
                    wait = retry_after(response.headers.get("Retry-After"), wait)
                    problem = f"HTTP {response.status_code}"
                elif response.status_code != 200:
                    raise Fail(f"{shown} answered HTTP {response.status_code}; check params.yaml's download.location")
                else:
                    save(response, target)
                    return
        # requests lets out urllib3's BaseHTTPError (a redirect cut short) and ValueErrors (one to what is no address).
        except (requests.RequestException, BaseHTTPError, ConnectionError, ValueError) as error:
            problem = type(error).__name__
        if attempt < ATTEMPTS:
            time.sleep(wait)
    raise Fail(
        f"{shown} could not be downloaded in {ATTEMPTS} tries (last: {problem}); "
        "check the network, or point params.yaml's download.location at a mirror directory"
    )


def retry_after(header: str | None, otherwise: float) -> float:
    """Seconds to wait: the server's Retry-After where it is a number (it may be a date), at most 60."""
    return min(float(header), 60.0) if header and header.isdecimal() else otherwise  # "²" is a digit, not a decimal


def save(response: Any, target: Path) -> None:
    """Write a response's body; raises ConnectionError if it is shorter than its Content-Length."""
    length = response.headers.get("Content-Length", "")
    expected = int(length) if length.isdecimal() else 0
    written = 0
    with (
        target.open("wb") as file,
        tqdm(total=expected or None, unit="B", unit_scale=True, desc=target.name.strip(".")) as bar,
    ):
        for block in response.iter_content(1 << 16):
            written += file.write(block)
            bar.update(len(block))
    # The body may be compressed on the way: then Content-Length counts other bytes, and the sha256 alone decides.
    if expected and written != expected and not response.headers.get("Content-Encoding"):
        raise ConnectionError(f"{written} of {expected} bytes")


def artificial_records(params: Artificial) -> dict[str, Record]:
    """`params.questions` of PQA-A, drawn by `params.seed`, as PQA-L's records."""
    import numpy as np
    from huggingface_hub import hf_hub_download
    from pyarrow.parquet import ParquetFile

    name = f"pqa_artificial/{params.file.name}"
    about = {"revision": params.revision, "repo_type": "dataset", "filename": name}
    path = from_hub("download.pqa_artificial", hf_hub_download, params.repo_id, **about)
    check(Path(path), params.file, params.repo_id)
    try:
        table = ParquetFile(path).read()  # Dataset.from_parquet would leave a copy of all texts in HF_HOME
        drawn = np.random.default_rng(params.seed).permutation(len(table))  # as `datasets` shuffles
        rows = [Row.model_validate(row) for row in table.take(drawn[: params.questions]).to_pylist()]
    except Exception as error:  # pyarrow raises many: of bytes that are no parquet, types, names, dates
        wrong = error.errors()[0] if isinstance(error, ValidationError) else None
        problem = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" if wrong else type(error).__name__
        raise Fail(
            f"{name} of {params.repo_id} is no table as PQA-A's is ({problem}); check download.pqa_artificial.file"
        ) from None
    if len(rows) < params.questions:
        raise Fail(f"params.yaml: download.pqa_artificial.questions: {name} holds only {len(rows)}; lower it")
    return {
        str(row.pubid): {
            "QUESTION": row.question,
            "CONTEXTS": row.context.contexts,
            "LABELS": row.context.labels,
            "LONG_ANSWER": row.long_answer,
            "final_decision": row.final_decision,
        }
        for row in rows
    }


def main(raw: Path) -> None:
    """Write RAW/ori_pqal.json, RAW/test_ground_truth.json and RAW/source.json."""
    params = load_params()
    with writing(raw) as partial:
        partial.mkdir()
        if isinstance(params, Simulated):
            from pipeline.simulated.trials import records

            questions, truth = records(params.seed, params.questions, params.test_questions)
            write_json(partial / "ori_pqal.json", questions)
            write_json(partial / "test_ground_truth.json", truth)
            source = {"simulated": True, "name": "simulated trials, no medical fact in them", "licence": "MIT"}
        else:
            fetch(params.location, params.records, partial / "ori_pqal.json")
            fetch(params.location, params.test_ground_truth, partial / "test_ground_truth.json")
            known = PUBMEDQA if params.records.sha256 == PUBMEDQA_SHA256 else {"name": "own data", "licence": "its own"}
            source = {"simulated": False, **known}
            if params.pqa_artificial:
                write_json(partial / "ori_pqaa.json", artificial_records(params.pqa_artificial))
        write_json(partial / "source.json", source)


if __name__ == "__main__":
    run(main)
