"""models/base, a small directory with a manifest -> a directory that transformers can load, every weight checked.

The weights of a hub model stay in the hub's cache (16 GB are neither copied nor tracked); those of the embedded tiny
Llama lie in models/base; those of a local model stay where they are.
"""

import hashlib
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.records import read_json
from pipeline.stage import Fail

MANIFEST = "manifest.json"
IDENTITY = "trained_on.json"  # beside an adapter: the weights it was trained on, and fits
TEMPLATE = "chat_template.jinja"
TERMS = ["LICENSE*", "USE_POLICY*"]  # they go with whatever is derived from a base
CONFIGURATION = ["*.json", "*.jinja", "tokenizer.model", *TERMS]  # config, tokenizer, chat template; never code


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
    if not (target / TEMPLATE).is_file():  # older models keep it in tokenizer_config.json
        template = read_json(target / "tokenizer_config.json").get("chat_template")
        if not isinstance(template, str):
            raise Fail(f"{source} has no chat template; base needs an instruct model")
        (target / TEMPLATE).write_text(template, encoding="utf-8")


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
            raise Fail(f"{path} is missing; run `dvc repro base`")
        if (size := path.stat().st_size) != expected["size"]:
            raise Fail(f"{path} has {size} bytes in place of {expected['size']}; remove it and run `dvc repro base`")


def check_digest(path: Path, found: str, files: list[dict[str, Any]]) -> None:
    """Raise `Fail` unless `found`, a file's sha256, is what the manifest's `files` expect."""
    if found != next(file["sha256"] for file in files if file["name"] == path.name):
        raise Fail(f"{path} does not have the sha256 in {MANIFEST}; remove it and run `dvc repro base`")


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
    return directory


def fetch(repo_id: str, revision: str, weights: list[str]) -> Path:
    """The hub cache's snapshot of a repository's configuration and of the named weights, downloaded where missing."""
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*CONFIGURATION, *weights]))


@contextmanager
def hub_errors(repo_id: str, revision: str) -> Generator[None]:
    """Turn what a hub or the network can answer into a sentence."""
    from httpx import HTTPError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError:
        raise Fail(
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id}, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise Fail(f"base.repo_id: {repo_id} is not on the hub or is private; check it, or set HF_TOKEN") from None
    except (HTTPError, OSError, ValueError) as error:  # the hub's own errors are these too; ValueError: no JSON or text
        raise Fail(
            f"{repo_id} at {revision} could not be fetched from the hub ({type(error).__name__}); "
            "check the network and base.revision, then run `dvc repro`"
        ) from None
