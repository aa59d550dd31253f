"""Base: a hub model, a local directory or the shipped tiny Llama -> models/base, a small directory without weights.

It holds the configuration, the tokenizer, the chat template and manifest.json, which names every weight file with size
and sha256. The base is examined once and completely here, before anything is trained. A hub model's weights are fetched
by the stage that first needs them. Only safetensors files are accepted, and no code of a repository is ever run.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from pipeline.core.json_files import read_json_object
from pipeline.core.outputs import write_json, writing
from pipeline.core.params import load_params
from pipeline.core.usage import Usage
from pipeline.models.directory import SINGLE, TINY_BASE, copy_configuration
from pipeline.models.examine import Tensor, check_prompt, check_tensors, read_header, weight_names
from pipeline.models.gguf import check_convertible
from pipeline.models.hub import fetch, from_hub
from pipeline.models.manifest import MANIFEST, Manifest, WeightFile
from pipeline.sections.base import BASE, Hub, Local, Tiny

TINY_SHA256 = "fe4542a675ca4e3f3ddd8637d129060bc95d03653214829bec78e68b3e1fc56b"  # of its weights
Model = Hub | Local | Tiny


def configuration_directory(params: Model) -> Path:
    """The directory that has the base's configuration and tokenizer; fetches a hub model's. Raises `Fail`."""
    match params:
        case Hub():
            return fetch(params.repo_id, params.revision, [])
        case Local():
            if params.path.startswith("~"):
                raise Fail(f"params.yaml: base.path: {params.path}: ~ is not expanded; write the whole path")
            if not Path(params.path).is_dir():
                raise Fail(
                    f"params.yaml: base.path: {params.path} is not a directory; correct it, then run `dvc repro`"
                )
            return Path(params.path)
        case Tiny():
            return TINY_BASE


def manifest_of(params: Model, directory: Path) -> Manifest:
    """Where the weights are, every file with size and sha256, and its tensors checked; raises `Fail`."""
    from huggingface_hub import constants

    match params:
        case Hub(repo_id=repo_id, revision=revision):
            if constants.HF_HUB_OFFLINE:  # the hub's cache has to be complete
                fetch(repo_id, revision, ["model*.safetensors"])
                files = local_files(directory, repo_id)
            else:
                files = hub_files(repo_id, revision, directory)
            return Manifest(source="hub", repo_id=repo_id, revision=revision, files=files)
        case Local(path=path):
            return Manifest(source="local", path=path, files=local_files(directory, path))
        case Tiny():
            weights = directory / SINGLE  # tests/unit/test_examine.py examines them: here their sha256 is enough
            if not weights.is_file() or sha256(weights) != TINY_SHA256:
                raise Fail("the tiny base is not as committed; run `git checkout pipeline/simulated/tiny_base`")
            file = WeightFile(name=SINGLE, size=weights.stat().st_size, sha256=TINY_SHA256)
            return Manifest(source="tiny", files=[file])


def local_files(directory: Path, source: str) -> list[WeightFile]:
    """The weight files of a model directory; raises `Fail`."""
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    paths = [directory / name for name in weight_names(directory, present, source)]
    check_tensors(directory, {name: tensor for path in paths for name, tensor in read_header(path).items()}, source)
    return [WeightFile(name=path.name, size=path.stat().st_size, sha256=sha256(path)) for path in paths]


def hub_files(repo_id: str, revision: str, directory: Path) -> list[WeightFile]:
    """The weight files of a repository at a commit, as the hub describes them; only their headers are downloaded."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    source, api = f"{repo_id} at {revision}", HfApi()
    info = from_hub("base", api.model_info, repo_id, revision=revision, files_metadata=True)
    siblings: dict[str, Any] = {file.rfilename: file for file in info.siblings or []}
    check_fetched(directory, siblings)
    # Llama 3's repositories hold the same weights again under original/: only the top level is the model.
    present = [name for name in siblings if "/" not in name and name.endswith(".safetensors")]
    files: list[WeightFile] = []
    tensors: dict[str, Tensor] = {}
    for name in weight_names(directory, present, source):
        if not siblings[name].lfs:
            raise Fail(f"{source}: the hub gives no sha256 of {name}; choose another base")
        files.append(WeightFile(name=name, size=siblings[name].size, sha256=siblings[name].lfs.sha256))
        request = partial(api.parse_safetensors_file_metadata, filename=name)
        try:
            header = from_hub("base", request, repo_id, revision=revision)
        except SafetensorsParsingError:
            raise Fail(f"{source}: {name} is not a safetensors file; choose another base") from None
        tensors |= {key: Tensor(value.dtype, tuple(value.shape)) for key, value in header.tensors.items()}
    check_tensors(directory, tensors, source)
    return files


def check_fetched(directory: Path, siblings: dict[str, Any]) -> None:
    """Raise `Fail` if a small file is not the one that the hub names: its sha256 or git's sha1 differs."""
    for name, file in siblings.items():
        path = directory / name
        if name.endswith(".safetensors") or not path.is_file():
            continue
        body = path.read_bytes()
        if file.lfs:
            whole = file.lfs.sha256 == hashlib.sha256(body).hexdigest()
        else:
            whole = file.blob_id == hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        if not whole:
            raise Fail(f"{path} differs from the hub's file; remove {path.resolve()} and run `dvc repro`")


def weights_note(directory: Path) -> str:
    """`weights_note` in config.json, a line of text: a key of ours, which transformers ignores."""
    note = read_json_object(directory / "config.json").get("weights_note", "")
    return " ".join(note.split()) if isinstance(note, str) else ""


def main(base: Path, metrics: Path, resources: Path) -> None:
    """Write BASE with its manifest; METRICS has the size of the weights, RESOURCES time and memory."""
    usage = Usage()
    params = load_params("base", BASE)
    directory = configuration_directory(params)
    source = "the tiny base" if isinstance(params, Tiny) else getattr(params, "repo_id", str(directory))
    with writing(base) as target:
        copy_configuration(directory, target)
        with ThreadPoolExecutor(1) as thread:  # the converter is a process, which imports the same packages for seconds
            convertible = thread.submit(check_convertible, target, source)
            manifest = manifest_of(params, directory).model_copy(update={"note": weights_note(directory)})
            check_prompt(directory)
            convertible.result()
        write_json(target / MANIFEST, manifest.model_dump())
    note = {"weights_note": manifest.note} if manifest.note else {}
    write_json(metrics, {"weight_bytes": sum(file.size for file in manifest.files), **note})
    write_json(resources, usage.figures())
