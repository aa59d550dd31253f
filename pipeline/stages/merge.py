"""Merge: base + LoRA adapter -> models/merged, in the base's own 16-bit type, tensor by tensor.

W + (lora_alpha / r) B A, accumulated in float32 and rounded once (Hu et al. 2021, https://arxiv.org/abs/2106.09685).
Few tensors are in memory at a time, however large the file: a safetensors file is a JSON header and then the tensors'
bytes (https://huggingface.co/docs/safetensors), so that it can be read, hashed and written as a stream.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.errors import Fail
from pipeline.core.files import read_as, sha256
from pipeline.core.json_files import read_json
from pipeline.core.outputs import write_json, writing
from pipeline.core.usage import Usage
from pipeline.models.base_weights import weights_directory
from pipeline.models.directory import check_whole, copy_configuration
from pipeline.models.manifest import ADAPTER, IDENTITY, Identity, Manifest, read_manifest

PREFIX = "base_model.model."  # what PEFT puts before a parameter's own name
RETRAIN = "run `dvc repro -f -s train`, then `dvc repro`"
WORKERS = 4  # files at a time: each holds one tensor of the adapter's in float32 and 16 bit, 0.35 GB for Llama 3 8B


def check_adapter(adapter: Path, manifest: Manifest) -> dict[str, Any]:
    """The adapter's configuration; raises `Fail` if it is for another base, or more than a plain sum can merge."""
    config: Any = read_json(adapter / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("fan_in_fan_out"):
        raise Fail(f"{adapter}/adapter_config.json is not that of a LoRA as `train` writes it; {RETRAIN}")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1_000_000:
            raise Fail(f"{adapter}/adapter_config.json: {name} must be a number between 0 and a million; {RETRAIN}")
    if read_as(Identity, adapter / IDENTITY).files != manifest.files:
        raise Fail(f"{adapter} was trained on other weights than models/base names; {RETRAIN}")
    for option in ("use_dora", "use_rslora", "modules_to_save", "alpha_pattern", "rank_pattern", "lora_bias"):
        if config.get(option):
            raise Fail(
                f"{adapter}/adapter_config.json: {option} is set, which merge does not support; train without it"
            )
    return config


def read_adapter(adapter: Path) -> dict[str, tuple[Any, Any]]:
    """Parameter name in the base -> (A of shape (r, in), B of shape (out, r)), both float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter / ADAPTER
    if path.is_file() and sha256(path) != read_as(Identity, adapter / IDENTITY).adapter:
        raise Fail(f"{path} is not as `train` wrote it: {IDENTITY} has another sha256; run `dvc checkout {adapter}`")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        raise Fail(f"{path} is missing, truncated or altered; run `dvc checkout {adapter}`") from None
    names = {name.removeprefix(PREFIX).replace(".lora_A.weight", "") for name in tensors if ".lora_A." in name}
    try:
        a, b = ({name: tensors.pop(f"{PREFIX}{name}.lora_{side}.weight").float() for name in names} for side in "AB")
    except KeyError as error:
        raise Fail(f"{path}: tensor {error.args[0]} is missing; {RETRAIN}") from None
    if tensors:
        raise Fail(f"{path}: {next(iter(tensors))} is not a LoRA matrix of a linear layer; {RETRAIN}")
    for name in names:
        if a[name].ndim != 2 or b[name].ndim != 2 or a[name].shape[0] != b[name].shape[1]:
            shapes = f"A (r, in) = {tuple(a[name].shape)}, B (out, r) = {tuple(b[name].shape)}"
            raise Fail(f"{path}: {name}: A and B disagree on the rank: {shapes}; {RETRAIN}")
    return {f"{name}.weight": (a[name], b[name]) for name in names}


def fold(weight: Any, pair: tuple[Any, Any], scale: float, name: str) -> Any:
    """weight + scale B A in float32, rounded to the weight's type; raises `Fail` on a wrong shape or overflow."""
    import torch

    a, b = pair
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        shapes = f"is {(b.shape[0], a.shape[1])}, the base's {tuple(weight.shape)}"
        raise Fail(f"{name}: the adapter's shape {shapes}; {RETRAIN}")
    folded = weight.to(torch.float32, copy=True).addmm_(b, a, alpha=scale).to(weight.dtype)
    low, high = torch.aminmax(folded)  # isfinite would copy the tensor; a NaN comes through
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise Fail(f"{name}: the merged weight is not finite; train with a lower train.learning_rate")
    return folded


def as_bytes(tensor: Any) -> Any:
    """The tensor's own memory as a one-dimensional array of uint8."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def merge_file(source: Path, target: Path, pairs: dict[str, tuple[Any, Any]], scale: float) -> tuple[set[str], str]:
    """Write `source` with the pairs folded in to `target`, a tensor at a time.

    Returns the names that were folded, and the sha256 of `source`.
    """
    from safetensors import safe_open

    with source.open("rb") as file:
        length = file.read(8)
        head = file.read(int.from_bytes(length, "little"))
    header = json.loads(head)
    order = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    digest = hashlib.sha256(length + head)
    with safe_open(source, "pt") as tensors, target.open("wb") as file:
        file.write(length + head)
        for name in tqdm(order, desc=f"merge {source.name}"):
            tensor = tensors.get_tensor(name)
            digest.update(as_bytes(tensor))
            if name in pairs:
                tensor = fold(tensor, pairs[name], scale, name)
            file.write(as_bytes(tensor))
    return pairs.keys() & set(order), digest.hexdigest()


def main(base: Path, adapter: Path, merged: Path, resources: Path) -> None:
    """Write MERGED: the base's files with ADAPTER folded into its weights."""
    import torch

    usage = Usage()
    manifest = read_manifest(base)
    config = check_adapter(adapter, manifest)
    pairs = read_adapter(adapter)
    directory = weights_directory(base, verify=False)
    check_whole([directory / file.name for file in manifest.files])
    scale = config["lora_alpha"] / config["r"]
    with writing(merged) as partial:
        copy_configuration(base, partial)
        folded: set[str] = set()
        names = [file.name for file in manifest.files]

        def merge_named(name: str) -> tuple[set[str], str]:
            return merge_file(directory / name, partial / name, pairs, scale)

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))
        with ThreadPoolExecutor(WORKERS) as threads:  # reading, hashing, adding and writing overlap
            for file, (found, digest) in zip(manifest.files, threads.map(merge_named, names), strict=True):
                if digest != file.sha256:
                    weights_directory(base)  # raises `Fail` with the remedy for this base
                    raise Fail(f"{directory / file.name} changed while it was read; run `dvc repro` again")
                folded |= found
        if missing := sorted(pairs.keys() - folded):
            raise Fail(f"{adapter}: {missing[0]} is not in the base ({len(missing)} in all); {RETRAIN}")
    write_json(resources, usage.figures())
