"""The release and the GGUF -> a model repository on the Hugging Face hub, in one commit.

Without --upload it only lists what it would upload. The GGUF files are uploaded from their places, under their public
names.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.errors import Fail
from pipeline.core.files import read_text, sha256
from pipeline.models.gguf_header import LICENCE, LLAMA_3_LICENCE, read_header
from pipeline.models.hub import check_token, http_status
from pipeline.models.quantized import read_sums
from pipeline.reporting.release import SUMS, public_name

MOVED = ("README.md", "Modelfile", "RUN.md")  # they name the GGUF files relative to models/ and models/release/


def collect(repo_id: str, release: Path, gguf: Path) -> dict[str, Path | bytes]:
    """Name in the repository -> file, or its text where that differs there; raises `Fail`."""
    header, pages = read_header(gguf), {path.name: path for path in release.glob("*")}
    if SUMS not in pages:
        raise Fail(f"{release} is no release: {SUMS} is missing; run `dvc repro` or `dvc pull` (a rehearsal has none)")
    digest = sha256(gguf)
    if digest not in read_text(pages[SUMS]):
        raise Fail(f"{release} is of another file than {gguf}; run `dvc repro`")
    if header.metadata.get(LICENCE) == LLAMA_3_LICENCE:
        if not repo_id.partition("/")[2].startswith("Llama-3"):
            raise Fail(f"Llama 3's licence requires a name that begins with it; rename {repo_id} to OWNER/Llama-3-...")
        if "LICENSE" not in pages:
            raise Fail(
                f"Llama 3's licence must go with the model, and {release} has no LICENSE; run `dvc repro -f base`"
            )
    quantized = gguf.parent / "quantized"
    sums = {gguf: digest, **(read_sums(quantized) if quantized.is_dir() else {})}
    names = {path: public_name(read_header(path)) for path in sums}
    texts = {SUMS: "".join(f"{digest}  {names[path]}\n" for path, digest in sums.items())}
    for page in MOVED:
        text = re.sub(rf"(?<!models/)(\.\./)?{re.escape(gguf.name)}", names[gguf], read_text(pages[page]))
        for path, name in names.items():
            text = text.replace(f"quantized/{path.name}", name)
        texts[page] = text.replace("release/", "")
    return {**pages, **{page: text.encode() for page, text in texts.items()}, **{names[path]: path for path in names}}


def upload(repo_id: str, files: dict[str, Path | bytes]) -> str:
    """Create the repository where it is missing, commit the files; the commit's address. Raises `Fail`."""
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_token()
    if not get_token():
        raise Fail(
            "the hub wants to know who you are: set HF_TOKEN to a token with write access, or run `hf auth login`"
        )
    api = HfApi()
    operations: list[Any] = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
    try:
        api.create_repo(repo_id, exist_ok=True)
        return str(api.create_commit(repo_id, operations, commit_message="medical-reasoner").commit_url)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        status = http_status(error)
        if status in (401, 403):
            raise Fail(
                f"the hub refuses to write to {repo_id} (HTTP {status}); give HF_TOKEN write access to it"
            ) from None
        why = f"HTTP {status}" if status else str(error).partition("\n")[0]
        raise Fail(f"{repo_id} could not be written ({why}); run this again: what arrived is not sent twice") from None


def main(
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    really: Annotated[bool, typer.Option("--upload", help="Upload; otherwise only list the files.")] = False,
    release: Path = Path("models/release"),
    gguf: Path = Path("models/medical-reasoner.gguf"),
) -> None:
    """List the files with their sizes, and upload them if told to."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
        raise Fail("give the repository as OWNER/NAME: make publish REPO=OWNER/NAME")
    files = collect(repo_id, release, gguf)
    for name, file in sorted(files.items()):
        typer.echo(f"{len(file) if isinstance(file, bytes) else file.stat().st_size:14,}  {name}")
    if really:
        typer.echo(f"Uploaded: {upload(repo_id, files)}")
    else:
        typer.echo(f"Nothing was uploaded. To upload this to {repo_id}: make publish REPO={repo_id} PUBLISH=1")
