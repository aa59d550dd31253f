"""Base: a hub model, a local directory or the embedded tiny Llama -> models/base, always a small directory.

It holds the configuration, the tokenizer, the chat template and manifest.json (where the weights come from, each file
with size and sha256). A hub model's weights are fetched by the stage that first needs them; the tiny Llama's are made
here. Nothing but safetensors is accepted, and no code of a model repository is ever run.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.records import write_json
from pipeline.core.stage import Fail, Section, Usage, read_section, run, writing
from pipeline.models.weights import AND_AGAIN, MANIFEST, copy_configuration, describe, fetch, from_hub


class Hub(Section):
    source: Literal["hub"]
    repo_id: Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$")]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]  # a commit: a branch moves


class Local(Section):
    source: Literal["local"]
    path: str


def load_params() -> Section:
    """The section `base`: which of the three models it is depends on `source`."""
    values = read_section("base")
    match values.get("source"):
        case "hub":
            return Hub.check("base", values)
        case "local":
            return Local.check("base", values)
        case "tiny":
            from pipeline.simulated.tiny import Tiny

            return Tiny.check("base", values)
        case other:
            raise Fail(f"params.yaml: base.source: {other!r} is not one of hub, local, tiny; set it to one")


def check_fetched(directory: Path, siblings: list[Any]) -> None:
    """Raise `Fail` if a fetched file is not the one that the hub names: its sha256 or, if it is small, git's sha1."""
    for file in siblings:
        path = directory / file.rfilename
        if not path.is_file():
            continue
        body = path.read_bytes()
        if file.lfs:
            whole = file.lfs.sha256 == hashlib.sha256(body).hexdigest()
        else:
            whole = file.blob_id == hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        if not whole:
            raise Fail(f"{path} is not what the hub has; remove {path.resolve()} {AND_AGAIN}")


def hub_weights(repo_id: str, revision: str) -> list[dict[str, Any]]:
    """Name, size and sha256 of a repository's safetensors files at a commit, as the hub (or a full cache) tells."""
    from huggingface_hub import HfApi

    if os.environ.get("HF_HUB_OFFLINE"):
        return describe(fetch(repo_id, revision, ["*.safetensors"]))
    directory = fetch(repo_id, revision, [])  # its errors are sentences, and come before any question about files
    info = from_hub("base", HfApi().model_info, repo_id, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    check_fetched(directory, [file for file in siblings if not file.rfilename.endswith(".safetensors")])
    # Llama 3's repositories hold the same weights once more under original/: only the top level is the model.
    shards = [file for file in siblings if "/" not in file.rfilename and file.rfilename.endswith(".safetensors")]
    if not shards:
        raise Fail(f"{repo_id} at {revision} holds no safetensors weights; pickle weights are refused, choose another")
    files: list[dict[str, Any]] = []
    for file in shards:
        if not file.lfs:
            raise Fail(
                f"{repo_id} at {revision}: the hub tells no sha256 of {file.rfilename}; choose another repository"
            )
        files.append({"name": file.rfilename, "size": file.size, "sha256": file.lfs.sha256})
    return files


def main(base: Path, metrics: Path, resources: Path) -> None:
    """Write BASE and its manifest; METRICS and RESOURCES say how a base made on the spot fared."""
    usage = Usage()
    figures: dict[str, float] = {}
    with writing(base) as partial:
        match load_params():
            case Hub(repo_id=repo_id, revision=revision):
                manifest = {"source": "hub", "repo_id": repo_id, "revision": revision}
                files = hub_weights(repo_id, revision)
                copy_configuration(fetch(repo_id, revision, []), partial)
            case Local(path=path):
                manifest = {"source": "local", "path": path}
                files = describe(Path(path))
                copy_configuration(Path(path), partial)
            case tiny:
                from pipeline.simulated.tiny import Tiny, build

                assert isinstance(tiny, Tiny)
                partial.mkdir()
                figures = build(partial, tiny)
                manifest = {"source": "tiny"}
                files = describe(partial)
        write_json(partial / MANIFEST, {**manifest, "files": files})
    write_json(metrics, {"weight_bytes": sum(file["size"] for file in files), **figures})
    write_json(resources, usage.figures())


if __name__ == "__main__":
    run(main)
