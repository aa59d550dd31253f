"""models/base, a small directory with a manifest -> a directory that transformers can load, every weight checked.

The weights of a hub model stay in the hub's cache (16 GB are neither copied nor tracked); those of the embedded tiny
Llama lie in models/base; those of a local model stay where they are.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from pipeline.core.records import AGAIN, read_json, read_object
from pipeline.core.stage import Fail, disk_problem

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"  # PEFT's name
IDENTITY = "trained_on.json"  # beside it: its sha256, and the weights that it was trained on, and fits
TEMPLATE = "chat_template.jinja"
TERMS = ["LICENSE*", "USE_POLICY*"]  # they go with whatever is derived from a base
CONFIGURATION = ["*.json", "*.jinja", "tokenizer.model", *TERMS]  # config, tokenizer, chat template; never code
AND_AGAIN = "and run `dvc repro`"  # a file of the hub's cache is a link: the file itself has to go
TRIES = 3  # of a request to the hub, whose own client tries most things five times

Found = TypeVar("Found")


class WeightFile(BaseModel):
    """A weight file of a manifest: a name without a path, its bytes and their sha256."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What models/base/manifest.json holds: which of the other keys are there depends on `source`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source: Literal["hub", "local", "tiny"]
    files: Annotated[list[WeightFile], Field(min_length=1)]
    repo_id: str = ""
    revision: str = ""
    path: str = ""


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest in `directory`; raises `Fail` unless it is one as `base` writes it."""
    path = directory / MANIFEST
    value = read_json(path)
    try:
        found = Manifest.model_validate(value)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        raise Fail(f"{path} is not as `base` writes it ({place}: {error.errors()[0]['msg']}); {AGAIN}") from None
    wanted = {"hub": {"repo_id", "revision"}, "local": {"path"}, "tiny": set[str]()}[found.source]
    if wanted != found.model_fields_set - {"source", "files"}:
        raise Fail(f"{path} is not as `base` writes it for the source {found.source}; {AGAIN}")
    return value


def describe(directory: Path) -> list[dict[str, Any]]:
    """Name, size in bytes and sha256 of every safetensors file in `directory`; raises `Fail` if there is none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise Fail(f"{directory} holds no *.safetensors file; pickle weights are refused, convert them first")
    check_whole(files)
    return [{"name": file.name, "size": file.stat().st_size, "sha256": digest(file)} for file in files]


def check_whole(files: list[Path]) -> None:
    """Raise `Fail` naming the first safetensors file that is missing or not as long as its header says."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, "np"):
                pass
        except (OSError, SafetensorError):
            raise Fail(f"{path} is missing, truncated or no safetensors file; make or fetch it again") from None


def copy_configuration(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template, which gets a file of its own, and no weights."""
    target.mkdir(parents=True)
    for pattern in CONFIGURATION:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (target / name).is_file():
            raise Fail(f"{source} has no {name}; base needs a transformers model directory with a fast tokenizer")
    refuse_code(target, source)
    if not (target / TEMPLATE).is_file():  # older models keep it in tokenizer_config.json
        template = read_json(target / "tokenizer_config.json").get("chat_template")
        if not isinstance(template, str):
            raise Fail(f"{source} has no chat template; base needs an instruct model")
        (target / TEMPLATE).write_text(template, encoding="utf-8")


def refuse_code(directory: Path, source: Path) -> None:
    """Raise `Fail` if a configuration, which comes from `source`, names code that a trusting loader would run."""
    for file in sorted(directory.glob("*config.json")):
        if "auto_map" in read_object(file):
            raise Fail(f"{source}: {file.name} names code of its own (auto_map), never run here; choose another base")


def digest(path: Path) -> str:
    """The sha256 of a file of many gigabytes, with a progress bar."""
    result = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"sha256 {path.name}") as bar:
        while block := file.read(1 << 22):
            result.update(block)
            bar.update(len(block))
    return result.hexdigest()


def check_sizes(directory: Path, files: list[dict[str, Any]]) -> None:
    """Raise `Fail` naming the first file that is missing or of another size."""
    for expected in files:
        path = directory / expected["name"]
        if not path.is_file():
            raise Fail(f"{path} is missing; run `dvc repro`")
        if (size := path.stat().st_size) != expected["size"]:
            raise Fail(f"{path} has {size} bytes in place of {expected['size']}; remove {path.resolve()} {AND_AGAIN}")


def check_digest(path: Path, found: str, files: list[dict[str, Any]]) -> None:
    """Raise `Fail` unless `found`, a file's sha256, is what the manifest's `files` expect."""
    if found != next(file["sha256"] for file in files if file["name"] == path.name):
        raise Fail(f"{path} does not have the sha256 in {MANIFEST}; remove {path.resolve()} {AND_AGAIN}")


def verify(directory: Path, files: list[dict[str, Any]]) -> None:
    """Raise `Fail` naming the first file that is missing, of another size or of another sha256."""
    check_sizes(directory, files)
    paths = [directory / file["name"] for file in files]
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock alone
        for path, found in zip(paths, threads.map(digest, paths), strict=True):
            check_digest(path, found, files)


def load_directory(base: Path, manifest: dict[str, Any]) -> Path:
    """The directory with the configuration, tokenizer and verified weights that `base`'s manifest names.

    Fetches a hub model's files at the manifest's commit where the cache lacks them. Raises `Fail`.
    """
    directory = locate(base, manifest)
    verify(directory, manifest["files"])
    return directory


def locate(base: Path, manifest: dict[str, Any]) -> Path:
    """As `load_directory`, for a stage that checks each sha256 itself while it reads the file."""
    if manifest["source"] == "hub":
        directory = fetch(manifest["repo_id"], manifest["revision"], [file["name"] for file in manifest["files"]])
    else:
        directory = Path(manifest["path"]) if manifest["source"] == "local" else base
    check_sizes(directory, manifest["files"])
    check_configuration(base, directory)
    refuse_code(directory, directory)
    return directory


def check_configuration(base: Path, directory: Path) -> None:
    """Raise `Fail` unless `directory` has the configuration and the tokenizer that `base` was made of."""
    for path in sorted(base.iterdir()):
        other = directory / path.name
        made_here = path.name == MANIFEST or (path.name == TEMPLATE and not other.is_file())
        if not made_here and (not other.is_file() or other.read_bytes() != path.read_bytes()):
            raise Fail(f"{other} is not what {path} is; remove {other.resolve()} {AND_AGAIN}")


def fetch(repo_id: str, revision: str, weights: list[str]) -> Path:
    """The hub cache's snapshot of a repository's configuration and of the named weights, downloaded where missing."""
    from huggingface_hub import snapshot_download

    patterns = [*CONFIGURATION, *weights]
    return Path(from_hub("base", snapshot_download, repo_id, revision=revision, allow_patterns=patterns))


def from_hub(section: str, request: Callable[..., Found], repo_id: str, *, revision: str, **options: Any) -> Found:
    """What `request` gets from a repository of the hub; raises `Fail` naming the section of params.yaml that asks.

    The hub's client goes on after a lost connection and a 429, but an error of the server's or a file of a wrong length
    ends it: these are tried again here, a bounded number of times.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    problem = ""
    for attempt in range(TRIES):
        time.sleep(2.0 * attempt)
        try:
            return request(repo_id, revision=revision, **options)
        except GatedRepoError:
            page = f"https://huggingface.co/{'datasets/' if 'repo_type' in options else ''}{repo_id}"
            raise Fail(f"{repo_id} is gated: accept its licence at {page}, then set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise Fail(
                f"{section}.repo_id: {repo_id} is not on the hub or is private; check it, or set HF_TOKEN"
            ) from None
        # The hub's own errors are the first two as well; ValueError: no JSON or no text.
        except (HTTPError, OSError, ValueError) as error:
            if disk_problem(error):
                why = getattr(error, "strerror", None) or type(error).__name__
                raise Fail(
                    f"{repo_id} cannot be written into the hub's cache ({why}); free disk, or set HF_HOME to another "
                    "directory, then run `dvc repro`"
                ) from None
            status = http_status(error)
            problem = f"HTTP {status}" if status else type(error).__name__
            if status < 500 and "Consistency check failed" not in str(error):
                break
    raise Fail(
        f"{repo_id} at {revision} could not be fetched from the hub ({problem}); "
        f"check the network and {section}.revision, then run `dvc repro`"
    )


def http_status(error: BaseException | None) -> int:
    """The HTTP status that an error of the hub's client, or what it came from, tells of; 0 if there is none."""
    while error:
        response: Any = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__ or error.__context__
    return 0
