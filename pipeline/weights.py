"""models/base, a small directory with a manifest -> a directory that transformers can load, every weight checked.

The weights of a hub model stay in the hub's cache (16 GB are neither copied nor tracked); those of the embedded tiny
Llama lie in models/base; those of a local model stay where they are.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.stage import Fail

MANIFEST = "manifest.json"
IDENTITY = "trained_on.json"  # beside an adapter: the weights it was trained on, and fits
CONFIGURATION = ["*.json", "*.jinja", "tokenizer.model"]  # config, tokenizer, chat template; never code


def describe(directory: Path) -> list[dict[str, Any]]:
    """Name, size in bytes and sha256 of every safetensors file in `directory`; raises `Fail` if there is none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise Fail(f"{directory} holds no *.safetensors file; pickle weights are refused, convert them first")
    return [{"name": file.name, "size": file.stat().st_size, "sha256": digest(file)} for file in files]


def copy_configuration(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template, and no weights."""
    target.mkdir(parents=True)
    for pattern in CONFIGURATION:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    for name in ("config.json", "tokenizer.json"):
        if not (target / name).is_file():
            raise Fail(f"{source} has no {name}; base needs a transformers model directory with a fast tokenizer")


def digest(path: Path) -> str:
    """The sha256 of a file of many gigabytes, with a progress bar."""
    result = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"sha256 {path.name}") as bar:
        while block := file.read(1 << 22):
            result.update(block)
            bar.update(len(block))
    return result.hexdigest()


def verify(directory: Path, files: list[dict[str, Any]]) -> None:
    """Raise `Fail` naming the first file that is missing, of another size or of another sha256."""
    for expected in files:
        path = directory / expected["name"]
        if not path.is_file():
            raise Fail(f"{path} is missing; run `dvc repro base`")
        if (size := path.stat().st_size) != expected["size"]:
            raise Fail(f"{path} has {size} bytes in place of {expected['size']}; remove it and run `dvc repro base`")
        if digest(path) != expected["sha256"]:
            raise Fail(f"{path} does not have the sha256 in {MANIFEST}; remove it and run `dvc repro base`")


def load_directory(base: Path, manifest: dict[str, Any]) -> Path:
    """The directory with the configuration, tokenizer and verified weights that `base`'s manifest names.

    Fetches a hub model's files at the manifest's commit where the cache lacks them. Raises `Fail`.
    """
    if manifest["source"] == "hub":
        directory = fetch(manifest["repo_id"], manifest["revision"], [file["name"] for file in manifest["files"]])
    else:
        directory = Path(manifest["path"]) if manifest["source"] == "local" else base
    verify(directory, manifest["files"])
    return directory


def fetch(repo_id: str, revision: str, weights: list[str]) -> Path:
    """The hub cache's snapshot of a repository's configuration and of the named weights, downloaded where missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*CONFIGURATION, *weights]))
    except GatedRepoError:
        raise Fail(
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id}, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise Fail(f"base.repo_id: {repo_id} is not on the hub or is private; check it, or set HF_TOKEN") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Fail(
            f"{repo_id} at {revision} could not be fetched from the hub ({type(error).__name__}); "
            "check the network and base.revision, then run `dvc repro`"
        ) from None
