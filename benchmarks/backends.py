"""Speed and VRAM of training on one CUDA card, by backend and shape of the batch: `train`'s own functions, timed.

    python -m benchmarks.backends --project rehearsal --profile profiles/llama3-8b-t4.yaml --set backend=trl \
        --batches 2x4,4x2,8x1

Runs in a project whose `format` and `base` stages have run (a rehearsal's, say) and prints a JSON object for each
batch. One backend a process: Unsloth changes TRL for good. --set changes parameters of the profile's `train` section.
No checkpoint is written, so that the speed is that between two of them: --set save_steps=10 shows what they cost.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core.records import read_json, read_jsonl
from pipeline.models.weights import MANIFEST, locate
from pipeline.stages.train import Params, build_trainer, check_backend, forget_loading, quantized_lora, step_recorder


def measure(params: Params, model: Any, tokenizer: Any, rows: dict[str, list[dict[str, Any]]], warm_up: int) -> Any:
    """Train `max_steps` steps; speed over those after the warm-up, and peaks of VRAM in GiB over all."""
    import torch

    with tempfile.TemporaryDirectory() as work:
        trainer = build_trainer(params, model, tokenizer, rows, Path(work))
        trainer.add_callback(step_recorder())
        forget_loading()
        trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    timed = history[warm_up:]
    seconds = sum(row["seconds"] for row in timed)
    tokens = timed[-1]["num_input_tokens_seen"] - history[warm_up - 1]["num_input_tokens_seen"]
    return {
        "backend": params.backend,
        "batch": f"{params.per_device_train_batch_size}x{params.gradient_accumulation_steps}",
        "dtype": params.dtype,
        "gradient_checkpointing": params.gradient_checkpointing,
        "offload_embedding": params.offload_embedding,
        "steps": len(timed),
        "tokens": tokens,
        "seconds_a_step": round(seconds / len(timed), 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "first_steps_s": round(sum(row["seconds"] for row in history[:warm_up]), 1),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "skipped_steps": sum(row["skipped"] for row in history),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--batches", default="", help="micro-batch x accumulation, comma-separated; else the profile's")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--longest", type=int, default=0, help="train on so many longest examples alone")
    options = parser.parse_args()
    yaml = YAML(typ="safe")
    values = yaml.load(options.profile)["train"] | {"max_steps": options.steps, "save_steps": options.steps}
    values |= {name: yaml.load(value) for name, value in (item.split("=", 1) for item in options.set)}
    batches = [batch.split("x") for batch in filter(None, options.batches.split(","))]
    runs = [
        Params.check("train", values | {"per_device_train_batch_size": int(m), "gradient_accumulation_steps": int(n)})
        for m, n in batches
    ] or [Params.check("train", values)]
    os.chdir(options.project)
    check_backend(runs[0])
    rows = {split: read_jsonl(Path(f"data/formatted/{split}.jsonl")) for split in ("train", "validation")}
    if options.longest:
        rows["train"].sort(key=lambda row: len(str(row)), reverse=True)
        del rows["train"][options.longest :]
    base = Path("models/base")

    from transformers import set_seed

    set_seed(runs[0].seed)
    model, tokenizer = quantized_lora(runs[0], locate(base, read_json(base / MANIFEST)))
    for params in runs:
        print("backends:", json.dumps(measure(params, model, tokenizer, rows, options.warm_up)), flush=True)


if __name__ == "__main__":
    main()
