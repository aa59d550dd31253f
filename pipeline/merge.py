"""Merge: base + LoRA adapter -> models/merged, in the base's own 16-bit type, tensor by tensor.

W + (lora_alpha / r) B A, accumulated in float32 and rounded once (Hu et al. 2021, https://arxiv.org/abs/2106.09685).
One tensor is in memory at a time, however large the file: a safetensors file is a JSON header and then the tensors'
bytes (https://huggingface.co/docs/safetensors), so that it can be written as a stream.
"""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.records import read_json, write_json
from pipeline.stage import Fail, Usage, run, writing
from pipeline.weights import IDENTITY, MANIFEST, copy_configuration, load_directory

PREFIX = "base_model.model."  # what PEFT puts before a parameter's own name


def check_adapter(adapter: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The adapter's configuration; raises `Fail` if it is for another base, or more than a plain sum can merge."""
    config = read_json(adapter / "adapter_config.json")
    if read_json(adapter / IDENTITY)["files"] != manifest["files"]:
        raise Fail(f"{adapter} was trained on other weights than models/base names; run `dvc repro train`")
    for option in ("use_dora", "use_rslora", "modules_to_save", "alpha_pattern", "rank_pattern", "lora_bias"):
        if config.get(option):
            raise Fail(f"{adapter}/adapter_config.json: {option} is set, and merge cannot fold it in; train without it")
    return config


def read_adapter(adapter: Path) -> dict[str, tuple[Any, Any]]:
    """Parameter name in the base -> (A of shape (r, in), B of shape (out, r)), both float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        raise Fail(f"{path} is missing, truncated or altered; run `dvc checkout {adapter}`") from None
    names = {name.removeprefix(PREFIX).replace(".lora_A.weight", "") for name in tensors if ".lora_A." in name}
    try:
        pairs = {
            f"{name}.weight": tuple(tensors.pop(f"{PREFIX}{name}.lora_{side}.weight").float() for side in "AB")
            for name in names
        }
    except KeyError as error:
        raise Fail(f"{path}: tensor {error.args[0]} is missing; run `dvc repro train`") from None
    if tensors:
        raise Fail(f"{path}: {next(iter(tensors))} is no LoRA matrix; run `dvc repro train`")
    return pairs


def fold(weight: Any, pair: tuple[Any, Any], scale: float, name: str) -> Any:
    """weight + scale B A in float32, rounded to the weight's type; raises `Fail` on a wrong shape or overflow."""
    import torch

    a, b = pair
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise Fail(f"{name}: the adapter's shape {(b.shape[0], a.shape[1])} is not the base's {tuple(weight.shape)}")
    folded = torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)
    if not bool(torch.isfinite(folded).all()):
        raise Fail(f"{name}: the merged weight is not finite; train with a lower train.learning_rate")
    return folded


def merge_file(source: Path, target: Path, pairs: dict[str, tuple[Any, Any]], scale: float) -> set[str]:
    """Write `source` with the pairs folded in to `target`, a tensor at a time; returns the names that were folded."""
    import torch
    from safetensors import safe_open

    with source.open("rb") as file:
        length = file.read(8)
        head = file.read(int.from_bytes(length, "little"))
    header = json.loads(head)
    order = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    with safe_open(source, "pt") as tensors, target.open("wb") as file:
        file.write(length + head)
        for name in tqdm(order, desc=f"merge {source.name}"):
            tensor = tensors.get_tensor(name)
            if name in pairs:
                tensor = fold(tensor, pairs[name], scale, name)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return pairs.keys() & set(order)


def main(base: Path, adapter: Path, merged: Path, resources: Path) -> None:
    """Write MERGED: the base's files with ADAPTER folded into its weights."""
    usage = Usage()
    manifest = read_json(base / MANIFEST)
    config = check_adapter(adapter, manifest)
    pairs = read_adapter(adapter)
    directory = load_directory(base, manifest)
    scale = config["lora_alpha"] / config["r"]
    with writing(merged) as partial:
        copy_configuration(directory, partial)
        folded: set[str] = set()
        for file in manifest["files"]:
            folded |= merge_file(directory / file["name"], partial / file["name"], pairs, scale)
        if missing := sorted(pairs.keys() - folded):
            raise Fail(f"{adapter}: {missing[0]} is not in the base ({len(missing)} such); run `dvc repro train`")
    write_json(resources, usage.figures())


if __name__ == "__main__":
    run(main)
