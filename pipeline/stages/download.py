"""Download: PubMedQA, a mirror of it, a user's own questions or the simulated trials -> data/raw.

Two files in the schema of PQA-L (Jin et al. 2019, https://arxiv.org/abs/1909.06146; https://github.com/pubmedqa/pubmedqa):
ori_pqal.json (PMID -> record) and test_ground_truth.json (PMID -> yes, no or maybe, for the test questions), each
checked against the sha256 in params.yaml; source.json says where they come from.
"""

import re
import shutil
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from pipeline.core.outputs import write_json, writing
from pipeline.core.params import load_params
from pipeline.core.source import Source
from pipeline.sections.download import DOWNLOAD, File, Files, Simulated

ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without a byte
PUBMEDQA_SHA256 = "8b3276be8942ebbd77f3ddcda12c1749bf0e490045a736fd8438ee40cf37a41d"  # ori_pqal.json at 1cbae8e


def fetch(location: str, file: File, target: Path) -> None:
    """Copy or download `file` from a directory or URL to `target`; raises `Fail` unless its sha256 is as expected."""
    with writing(target) as partial:
        if location.startswith(("https://", "http://")):
            download(f"{location.rstrip('/')}/{file.name}", partial)
        else:
            origin = Path(location) / file.name
            if not origin.is_file():
                raise Fail(
                    f"{printable(str(origin))} is missing; put it there, or correct download.location in params.yaml"
                )
            shutil.copyfile(origin, partial)
        if (found := sha256(partial)) != file.sha256:
            raise Fail(
                f"{file.name} from {printable(location)} has sha256 {found}, and params.yaml expects {file.sha256}; if "
                "you want the new file, write its sha256 into the section download"
            )


def printable(location: str) -> str:
    """The location without the user name and password that a URL can hold: errors end up in logs and issues."""
    return re.sub(r"(\w:/+)[^/]*@", r"\1", location, count=1)


def download(url: str, target: Path) -> None:
    """Download `url`; lost connections, short bodies, HTTP 429 and 5xx are retried ATTEMPTS times in all.

    urllib3's own Retry does not cover a body that ends early.
    """
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
                    raise Fail(f"{shown} answered HTTP {response.status_code}; check download.location in params.yaml")
                else:
                    save(response, target)
                    return
        # requests lets through urllib3's BaseHTTPError (a truncated redirect) and ValueError (an invalid address).
        except (requests.RequestException, BaseHTTPError, ConnectionError, ValueError) as error:
            problem = type(error).__name__
        if attempt < ATTEMPTS:
            time.sleep(wait)
    raise Fail(
        f"{shown} could not be downloaded in {ATTEMPTS} tries (last: {problem}); check the network, or set "
        "download.location in params.yaml to a directory with the files"
    )


def retry_after(header: str | None, default: float) -> float:
    """Seconds to wait: the server's Retry-After if it is a number (it may be a date), at most 60."""
    return min(float(header), 60.0) if header and header.isdecimal() else default  # isdigit() accepts "²"


def save(response: Any, target: Path) -> None:
    """Write a response's body; raises ConnectionError if it is shorter than its Content-Length."""
    length = response.headers.get("Content-Length", "")
    expected = int(length) if length.isdecimal() else 0
    written = 0
    name = target.name.removeprefix(".").removesuffix(".partial")
    with target.open("wb") as file, tqdm(total=expected or None, unit="B", unit_scale=True, desc=name) as bar:
        for block in response.iter_content(1 << 16):
            written += file.write(block)
            bar.update(len(block))
    # Of a compressed body, Content-Length counts other bytes; then the sha256 alone decides.
    if expected and written != expected and not response.headers.get("Content-Encoding"):
        raise ConnectionError(f"{written} of {expected} bytes")


def fetch_files(params: Files, raw: Path) -> Source:
    """Write both files into `raw`."""
    files = {"ori_pqal.json": params.records, "test_ground_truth.json": params.test_ground_truth}
    for name, file in files.items():
        fetch(params.location, file, raw / name)
    is_pubmedqa = params.records.sha256 == PUBMEDQA_SHA256
    return Source(
        simulated=False,
        name="PubMedQA PQA-L" if is_pubmedqa else "own data",
        licence="MIT" if is_pubmedqa else "",
        dataset="qiaojin/PubMedQA" if is_pubmedqa else "",
        records=params.records.name,
        test_ground_truth=params.test_ground_truth.name,
    )


def simulate(params: Simulated, raw: Path) -> Source:
    """Write simulated trials into `raw`."""
    from pipeline.simulated.trials import records

    questions, truth = records(params.seed, params.questions, params.test_questions)
    write_json(raw / "ori_pqal.json", questions)
    write_json(raw / "test_ground_truth.json", truth)
    return Source(
        simulated=True,
        name="simulated trials without any medical fact",
        licence="MIT",
        dataset="",
        records="ori_pqal.json",
        test_ground_truth="test_ground_truth.json",
    )


def main(raw: Path) -> None:
    """Write RAW/ori_pqal.json, RAW/test_ground_truth.json and RAW/source.json."""
    params = load_params("download", DOWNLOAD)
    with writing(raw) as partial:
        partial.mkdir()
        source = simulate(params, partial) if isinstance(params, Simulated) else fetch_files(params, partial)
        write_json(partial / "source.json", source.model_dump())
