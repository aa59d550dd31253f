"""Measure speed and VRAM of training on one CUDA card, by backend and shape of the batch.

    python -m benchmarks.backends --project rehearsal --profile profiles/llama3-8b.yaml --name h200 \
        --set gradient_checkpointing=true --set backend=trl --batches 2x4,4x2,8x1

Runs `train`'s own functions in a project whose stages `format` and `base` have run, such as a rehearsal's. One backend
a process, because Unsloth replaces functions of TRL. --set changes parameters of the profile's section `train`. No
checkpoint is written unless SAVE_STEPS says so. Without --batches the profile's own is measured. --attention measures
each batch a second time from the same adapter, without `kernels.split_examples`.
"""

import argparse
import importlib
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ruamel.yaml import YAML

from benchmarks.machine import LOGS
from benchmarks.record import Figures, record
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.models.base_weights import weights_directory
from pipeline.sections.train import Train
from pipeline.training.lora import check_backend, quantized_lora
from pipeline.training.trainer import build_trainer, reset_peak_memory, step_recorder


def measure(params: Train, model: Any, tokenizer: Any, train: list[Example], warm_up: int) -> dict[str, Any]:
    """Train `max_steps` steps: speed after the warm-up, and the peaks of VRAM in GiB over all steps."""
    import torch

    with tempfile.TemporaryDirectory() as work:
        trainer = build_trainer(params, model, tokenizer, train, train[:1], Path(work))
        trainer.add_callback(step_recorder(params.model_copy(update={"eval_steps": params.max_steps}), trainer))
        reset_peak_memory()
        trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    timed = history[warm_up:]
    seconds = sum(row["seconds"] for row in timed)
    tokens = timed[-1]["num_input_tokens_seen"] - history[warm_up - 1]["num_input_tokens_seen"]
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "seconds_a_step": round(seconds / len(timed), 3),
        "steps": len(timed),
        "skipped_steps": sum(row["skipped"] for row in history),
        "padding_free": trainer.args.padding_free,
        "losses": [row["loss"] for row in history],
        "gradient_norms": [row["grad_norm"] for row in history],
    }


def restore(model: Any, drawn: dict[str, Any]) -> None:
    """Give the adapter its first values again."""
    for name, value in model.named_parameters():
        if name in drawn:
            value.data = drawn[name].to(value.device, copy=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the card, in the figures' keys and the log's name")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--batches", default="", help="micro-batch x accumulation, comma-separated")
    parser.add_argument("--attention", action="store_true", help="compare with Unsloth's own slices")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    options = parser.parse_args()
    yaml = YAML(typ="safe")
    values = yaml.load(options.profile)["train"] | {"max_steps": options.steps}
    values |= {name: yaml.load(value) for name, value in (item.split("=", 1) for item in options.set)}
    shapes = [map(int, batch.split("x")) for batch in filter(None, options.batches.split(","))]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    runs = [Train(**{**values, **dict(zip(names, shape, strict=True))}) for shape in shapes] or [Train(**values)]
    os.environ.setdefault("SAVE_STEPS", str(options.steps))
    os.chdir(options.project)
    check_backend(runs[0])
    attention: Any = importlib.import_module("unsloth.utils.attention_dispatch") if options.attention else None
    own = attention and attention._sdpa_packed_segments  # before `quantized_lora` replaces it
    train = read_rows(Path("data/formatted/train.jsonl"), Example)

    from transformers import set_seed

    set_seed(runs[0].seed)
    model, tokenizer = quantized_lora(runs[0], weights_directory(Path("models/base"), verify=False))
    figures: Figures = {}
    lines: list[str] = []
    # In main memory, or it would count as VRAM of the training.
    drawn = {
        name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters() if value.requires_grad
    }
    for params in runs:
        found = measure(params, model, tokenizer, train, options.warm_up)
        batch = f"{params.per_device_train_batch_size}x{params.gradient_accumulation_steps}"
        lines.append(f"{params.backend} {batch}: {json.dumps(found)}")
        print(lines[-1], flush=True)
        examples = params.per_device_train_batch_size * params.gradient_accumulation_steps
        measured = f"{options.name}{f'.{params.backend}.{batch}' if options.batches else ''}"
        key = f"train.batch{examples}" if options.attention else f"train.{measured}"
        figures[f"{key}.tokens_per_s"] = (found["tokens_per_s"], "tokens/s")
        figures[f"{key}.peak_reserved_gib"] = (found["peak_reserved_gib"], "GiB")
        if options.attention:
            restore(model, drawn)
            with patch.object(attention, "_sdpa_packed_segments", own):
                before = measure(params, model, tokenizer, train, options.warm_up)
            restore(model, drawn)
            lines.append(f"{params.backend} {batch}, Unsloth's own slices: {json.dumps(before)}")
            print(lines[-1], flush=True)
            speedup = found["tokens_per_s"] / before["tokens_per_s"]
            figures[f"{key}.speedup_over_previous"] = (round(speedup, 3), "of Unsloth's own slices")
            for name in ("losses", "gradient_norms"):
                pairs = zip(found[name], before[name], strict=True)
                difference = max(abs(a - b) / abs(b) for a, b in pairs)
                figures[f"{key}.{name}_difference"] = (round(difference, 6), "of a step's, the largest")
    of = "attention" if options.attention else runs[0].backend if options.batches else options.profile.stem
    log = LOGS / f"backends_{of}.log"
    given = shlex.join(sys.argv[1:]).replace(str(options.project), "DIR")
    record(figures, f"python -m benchmarks.backends {given}", log, text="\n".join(lines))


if __name__ == "__main__":
    main()
