"""Say what the parameters in force need before anything is downloaded: weights, disk, memory, VRAM, size of each GGUF.

Nothing is refused: what does not fit is listed at the end, with the parameters to change.
"""

import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import typer

from pipeline.core.errors import Fail
from pipeline.core.json_files import read_json_object
from pipeline.core.params import load_params
from pipeline.models.directory import TINY_BASE
from pipeline.models.gguf_header import Tensor
from pipeline.models.hub import from_hub
from pipeline.models.manifest import MANIFEST, read_manifest
from pipeline.models.memory import (
    CARDS,
    GIB,
    MIB,
    RESERVED,
    Load,
    Needs,
    Shape,
    file_size,
    gguf_vram,
    layers_that_fit,
    small_load,
    stages,
    training_vram,
)
from pipeline.models.sizes import quantized
from pipeline.reporting.pages import aligned
from pipeline.scoring.scorer import MAX_TAILS, N_UBATCH
from pipeline.sections.base import BASE, Hub, Local, Tiny
from pipeline.sections.evaluate import Evaluate, Reference
from pipeline.sections.generate import Generate
from pipeline.sections.pretrain import PRETRAIN, Pretrain
from pipeline.sections.quantize import NEED_MATRIX, Quantize, QuantType
from pipeline.sections.train import Train

OPTIONAL: dict[str, type[Reference | Generate]] = {"reference": Reference, "generate": Generate}  # stages
SMALL_R = 8  # a smaller rank saves next to nothing


class Base(NamedTuple):
    """The base's shape, where it comes from, and what is to be fetched."""

    name: str
    shape: Shape
    where: str  # the shapes come from there
    fetched: int  # bytes of weights that are not here yet
    note: str  # what the hub did not say; empty otherwise


class Card(NamedTuple):
    """A CUDA card."""

    name: str
    memory: int  # bytes, all of it


def hub_base(params: Hub, given: Path | None) -> Base:
    """A hub model, described by the hub; offline by a configuration that is here. Raises `Fail` if there is none."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    repo_id, revision = params.repo_id, params.revision
    cached = partial(try_to_load_from_cache, repo_id, revision=revision)
    copy, sizes, note = Path("models/base"), None, ""
    try:
        info: Any = from_hub("base", HfApi().model_info, repo_id, revision=revision, files_metadata=True)
        sizes = {
            file.rfilename: file.size
            for file in info.siblings or []
            if file.rfilename.startswith("model") and file.rfilename.endswith(".safetensors")
        }
        if not given:
            from_hub("base", partial(hf_hub_download, filename="config.json"), repo_id, revision=revision)
    except Fail as error:
        note = str(error).removesuffix(", then run `dvc repro`")
    found = cached("config.json")
    if given:
        path, where = given, str(given)
    elif isinstance(found, str):
        path, where = Path(found), "the hub's cache" if note else "the hub"
    elif (copy / MANIFEST).is_file() and (manifest := read_manifest(copy)).repo_id == repo_id:
        path, where = copy / "config.json", f"{copy} ({manifest.revision[:7]})"
    else:
        raise Fail(f"{note}; or give its config.json: `python -m pipeline plan --config FILE`")
    shape = Shape.of_config(read_json_object(path), where)
    missing = (
        {"": 2 * shape.parameters}
        if sizes is None
        else {name: size for name, size in sizes.items() if not isinstance(cached(name), str)}
    )
    if note:
        what = "sizes, so they are computed" if sizes is None else "configuration"
        note = f"The hub gave no {what}: {note}"
    return Base(f"{repo_id} at {revision[:7]}", shape, where, sum(missing.values()), note)


def describe(params: Hub | Local | Tiny, given: Path | None) -> Base:
    """The base that params.yaml names, with the configuration `given` in place of its own; raises `Fail`."""
    if isinstance(params, Hub):
        return hub_base(params, given)
    name, directory = ("the tiny base", TINY_BASE) if isinstance(params, Tiny) else (params.path, Path(params.path))
    path, where = (given, str(given)) if given else (directory / "config.json", f"{name}'s config.json")
    return Base(name, Shape.of_config(read_json_object(path, where), where), where, 0, "")


def this_card() -> Card | None:
    """The first CUDA card, by nvidia-smi or torch."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        name, memory = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().rsplit(",", 1)
        return Card(name, int(memory) * MIB)
    except (OSError, ValueError, subprocess.CalledProcessError):
        import torch

        if not torch.cuda.is_available():
            return None
        found = torch.cuda.get_device_properties(0)
        return Card(found.name, found.total_memory)


def smaller(shape: Shape, params: Train, room: int) -> dict[str, Any] | None:
    """The changes of a phase with which it fits `room` bytes of a card, cheapest first; None if none are enough."""
    changes: dict[str, Any] = {}
    while training_vram(shape, now := params.model_copy(update=changes), params.max_length) > room:
        if not now.gradient_checkpointing:
            changes["gradient_checkpointing"] = True
        elif now.per_device_train_batch_size > 1:
            times = 2 if now.per_device_train_batch_size % 2 == 0 else now.per_device_train_batch_size
            changes["per_device_train_batch_size"] = now.per_device_train_batch_size // times
            changes["gradient_accumulation_steps"] = now.gradient_accumulation_steps * times
        elif now.backend == "trl":
            changes["backend"] = "unsloth"
        elif not now.offload_embedding:
            changes["offload_embedding"] = True
        elif now.r > SMALL_R:
            changes["r"] = max(now.r // 2, SMALL_R)
        else:
            return None
    return changes


def training_advice(shape: Shape, params: Train, memory: int, name: str) -> list[str]:
    """A line if training does not fit a card of that memory."""
    changes = smaller(shape, params, memory - RESERVED)
    if changes is None:
        return [
            f"{name}: training does not fit, whatever the parameters of {params.section}; take a larger card or a "
            "smaller base"
        ]
    settings = ", ".join(f"{params.section}.{key}: {str(value).lower()}" for key, value in changes.items())
    return [f"{name}: training fits with {settings}"] if changes else []


def card_table(
    shape: Shape, files: dict[str, dict[str, Tensor]], listed: list[str], load: Load, training: int
) -> list[list[str]]:
    """What fits which card: training, and for each type the layers on the card where not all fit."""
    rows = [["", "file, MB", "VRAM, MiB", *(f"{card} GB" for card in CARDS)]]
    fits = ["fits" if training <= card * GIB - RESERVED else "no" for card in CARDS]
    rows.append(["training", "", f"{training / MIB:,.0f}", *fits])
    for name, tensors in files.items():
        layers = [layers_that_fit(tensors, shape, load, card * GIB - RESERVED) for card in CARDS]
        cells = ["whole" if count > shape.layers else f"{count} of {shape.layers + 1}" for count in layers]
        size, needed = file_size(tensors, shape) / 1e6, gguf_vram(tensors, shape, load) / MIB
        rows.append([f"{name} *" if name in listed else name, f"{size:,.0f}", f"{needed:,.0f}", *cells])
    return rows


def shortages(needs: dict[str, Needs], base: Base) -> list[str]:
    """A line for the disk and one for the memory of this machine if they are too small."""
    import psutil

    found: list[str] = []
    stage = max(needs, key=lambda name: needs[name].disk)
    free = shutil.disk_usage(".").free
    if needs[stage].disk > free:
        saving = ["free some"]
        if base.fetched:
            saving.append(f"set HF_HOME to a directory on another disk ({base.fetched / 1e9:.1f} GB)")
        if stage in OPTIONAL:
            saving.append(f"set {stage}.enabled: false")
        found.append(
            f"disk: {stage} needs {needs[stage].disk / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            f"{' or '.join(saving)}"
        )
    stage = max(needs, key=lambda name: needs[name].memory)
    available = psutil.virtual_memory().available
    if needs[stage].memory > available:
        needed, here = needs[stage].memory / GIB, available / GIB
        found.append(f"memory: {stage} needs {needed:.1f} GiB and {here:.1f} GiB are free; close programs, or add swap")
    return found


def main(
    config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A config.json with the base's shapes, to plan offline."),
    ] = None,
) -> None:
    """Print what `dvc repro` will need."""
    base = describe(load_params("base", BASE), config)
    train, quantize = load_params("train", Train), load_params("quantize", Quantize)
    evaluate, pretrain = load_params("evaluate", Evaluate), load_params("pretrain", PRETRAIN)
    phases: dict[str, Train] = {"pretrain": pretrain} if isinstance(pretrain, Pretrain) else {}
    phases["train"] = train
    optional = [stage for stage, section in OPTIONAL.items() if load_params(stage, section).enabled]
    shape, card, listed = base.shape, this_card(), list[str](quantize.quant_types)
    matrix = quantize.imatrix_questions > 0
    types = [name for name in get_args(QuantType) if matrix or name not in NEED_MATRIX]
    files = quantized(shape, types, matrix)
    sizes = [file_size(files[name], shape) for name in listed]
    larger = max(phases.values(), key=lambda phase: training_vram(shape, phase, phase.max_length))
    needs = stages(shape, phases, base.fetched, sizes, optional, bool(card) or larger.backend == "unsloth")
    training, load = training_vram(shape, larger, larger.max_length), small_load(evaluate.n_ctx)
    scorer = Load(evaluate.n_ctx, N_UBATCH, evaluate.cache_type, evaluate.cache_type != "f16", n_outputs=1 + MAX_TAILS)
    scoring = gguf_vram(files[listed[0]], shape, scorer)

    advice = shortages(needs, base)
    if card:
        advice += [line for phase in phases.values() for line in training_advice(shape, phase, card.memory, card.name)]
        if scoring > card.memory - RESERVED:
            count = layers_that_fit(files[listed[0]], shape, scorer, card.memory - RESERVED)
            advice.append(f"{card.name}: evaluate needs N_GPU_LAYERS={count} in the environment")
    elif train.backend == "unsloth":
        advice.append("no CUDA card was found, and train.backend: unsloth needs one; rent one, or take a smaller base")
    for memory in CARDS:
        size = f"card of {memory} GB"
        advice += [line for phase in phases.values() for line in training_advice(shape, phase, memory * GIB, size)]
        room = memory * GIB - RESERVED
        whole = [name for name in types if gguf_vram(files[name], shape, load) <= room]
        if whole and not set(whole) & set(listed):
            best = max(whole, key=lambda name: gguf_vram(files[name], shape, load))
            advice.append(f"{size}: the largest type that it holds whole is {best}")
    lines = [
        f"{base.name}: {shape.parameters / 1e6:,.0f} million parameters, shapes from {base.where}",
        *([base.note] if base.note else []),
        f"Weights to fetch: {f'{base.fetched / 1e9:.1f} GB' if base.fetched else 'none'}",
        f"This machine: {f'{card.name}, {card.memory / MIB:,.0f} MiB' if card else 'no CUDA card'}",
        "",
        *aligned([["at its peak", "disk, GB", "memory, GiB"], *([
            [stage, f"{need.disk / 1e9:.1f}", f"{need.memory / GIB:.1f}"] for stage, need in needs.items()
        ])]),
        "",
        f"Scoring takes {scoring / MIB:,.0f} MiB of a card. On cards that are sold as:",
        *aligned(card_table(shape, files, listed, load, training)),
        "",
        f"* in params.yaml. {RESERVED / MIB:.0f} MiB of each card are left to the desktop and to CUDA.",
        f"Training: examples of {larger.max_length:,} tokens. Files: {load.n_ctx:,} tokens, loaded as RUN.md says.",
        "",
        *(["To change:", *advice] if advice else ["Everything fits."]),
    ]  # fmt: skip
    typer.echo("\n".join(lines))
