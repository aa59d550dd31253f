"""Measure the VRAM that the T4 profile reserves, by variants of its settings, each in a process of its own.

    python -m benchmarks.t4_vram --tokenizer DIR --pubmedqa DIR --variants unpaged,unpaged_1x8 --steps 12
    python -m benchmarks.t4_vram --tokenizer DIR --pubmedqa DIR --variants previous,now --steps 60

A short run has the eight longest examples five times among 80, so that they meet in a micro-batch; one of 60 steps has
all examples. On a CPU, `--shape tiny` tries the command with float32 and the backend trl. Each figure is printed and
recorded as soon as it is known. The project in --directory is several_cards' own.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.backends import measure
from benchmarks.machine import LOGS, ROOT
from benchmarks.record import Figures, record
from benchmarks.several_cards import project, say
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.models.base_weights import weights_directory
from pipeline.sections.train import Train
from pipeline.training import lora

LONG = 60  # steps, from which on all examples are used
UNPAGED = {"optim": "adamw_8bit"}
ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
# Parameters of the section train, and environment; `previous` is without the changes of pipeline/training/kernels.py.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "previous": (UNPAGED, {}),
    "now": ({}, {}),
    "unpaged": (UNPAGED, {}),
    "unpaged_1x8": (UNPAGED | ONE, {}),
    "unpaged_64_rows": (UNPAGED, {"UNSLOTH_FUSED_LINEAR_MIN_ROWS": "64"}),  # of the answers, whose logits are held
}


def run_variant(name: str, directory: Path, steps: int, tiny: bool) -> dict[str, Any]:
    """Train with one variant in this process, whose environment is the variant's."""
    changes, _ = VARIANTS[name]
    profile: Any = YAML(typ="safe").load(ROOT / "profiles" / "llama3-8b-t4.yaml")
    values = profile["train"] | changes | {"max_steps": steps}
    if tiny:
        values |= {"backend": "trl", "dtype": "float32", "offload_embedding": False, "optim": "adamw_torch"}
    params = Train(**values)
    os.environ.setdefault("SAVE_STEPS", "1000000")
    os.chdir(directory)
    lora.check_backend(params)

    import torch
    from transformers import set_seed

    if name == "previous":
        lora.share_buffer = lora.split_examples = lambda: None
    rows = read_rows(Path("data/formatted/train.jsonl"), Example)
    longest = sorted(rows, key=lambda row: -len(row.input_ids))[:8]
    others = [row for row in rows if row not in longest]
    set_seed(params.seed)
    say(f"{name}: loading; the longest examples have {[len(row.input_ids) for row in longest]} tokens")
    model, tokenizer = lora.quantized_lora(params, weights_directory(Path("models/base"), verify=False))
    say(f"{name}: loaded")
    found = measure(params, model, tokenizer, rows if steps >= LONG else longest * 5 + others[:40], 3)
    if torch.cuda.is_available():
        settings: Any = torch.cuda.memory._snapshot().get("allocator_settings", {})  # pyright: ignore
        found |= {
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "expandable_segments": settings.get("expandable_segments"),
            "allocator_retries": torch.cuda.memory_stats().get("num_alloc_retries"),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a directory with Llama 3's tokenizer")
    parser.add_argument("--pubmedqa", type=Path, help="a directory with PubMedQA's two files")
    parser.add_argument("--directory", type=Path, default=Path("several_cards"), help="kept; 20 GB")
    parser.add_argument("--variants", default="previous,now", help=f"comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--shape", choices=["llama3-8b", "tiny"], default="llama3-8b")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    directory, tiny = options.directory.absolute(), options.shape == "tiny"
    if options.one:
        print(f"result: {json.dumps(run_variant(options.one, directory, options.steps, tiny))}", flush=True)
        return
    if not (directory / "data" / "formatted" / "train.jsonl").is_file():
        project(directory, tiny, options.tokenizer, options.pubmedqa)
    figures: Figures = {}
    lines: list[str] = []
    command = f"python -m benchmarks.t4_vram --variants {options.variants} --steps {options.steps}"
    for name in options.variants.split(","):
        given = ["--directory", str(directory), "--steps", str(options.steps), "--shape", options.shape, "--one", name]
        environment = os.environ | VARIANTS[name][1]
        say(f"{name}: starting")
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.t4_vram", *given],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        found: dict[str, Any] = {}
        for line in process.stdout or ():
            if line.startswith("result: "):
                found = json.loads(line.removeprefix("result: "))
            else:
                print(line, end="", flush=True)
        if process.wait() or not found:
            say(f"{name}: failed with status {process.returncode}")
            continue
        lines.append(f"{name}, {options.steps} steps: {json.dumps(found)}")
        say(lines[-1])
        kind = ("" if options.steps >= LONG else ".longest") + ("" if name == "now" else f".{name}")
        figures[f"train.t4{kind}.peak_reserved_gib"] = (found["peak_reserved_gib"], "GiB")
        figures[f"train.t4{kind}.tokens_per_s"] = (found["tokens_per_s"], "tokens/s")
        if not tiny:
            log = LOGS / ("t4_vram.log" if options.steps >= LONG else "t4_vram_variants.log")
            record(figures, command, log, text="\n".join(lines))


if __name__ == "__main__":
    main()
