"""What a small card can do with a GGUF: VRAM, prompt and generation speed with some or all layers on it.

    python -m benchmarks.layers --gguf rehearsal/models/medical-reasoner.gguf \
        --test rehearsal/data/formatted/test.jsonl --layers 16,24,33

Prints a JSON object for each number of layers, each measured in a process of its own. `time_over_bare_prompt` is what
scoring costs over decoding the same prompts and reading nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.core.records import read_jsonl
from pipeline.scoring.scorer import Scorer


def vram_used() -> float:
    """MiB in use on the first card, by anything."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(gguf: Path, test: Path, n_ctx: int, questions: int, layers: int, before: float) -> dict[str, Any]:
    """One number of layers, in this process."""
    os.environ["N_GPU_LAYERS"] = str(layers)
    prompts = [row["prompt"] for row in read_jsonl(test)[:questions]]
    with Scorer(gguf, n_ctx) as scorer:
        tokens = [scorer.chat(messages)[0] for messages in prompts]
        scorer.score(tokens[0], scorer.forms)
        start = time.perf_counter()
        for ids in tokens:
            scorer.lib.llama_memory_clear(scorer.lib.llama_get_memory(scorer.context), True)
            scorer.decode(ids, [], 0)
            scorer.lib.llama_synchronize(scorer.context)
        bare = time.perf_counter() - start
        start = time.perf_counter()
        for messages in prompts:
            scorer.score(*scorer.chat(messages))
        scored = time.perf_counter() - start
        used = vram_used()
        start = time.perf_counter()
        for i in range(64):
            scorer.decode([tokens[-1][i % len(tokens[-1])]], [], len(tokens[-1]) + i)
            scorer.lib.llama_synchronize(scorer.context)
        generated = 64 / (time.perf_counter() - start)
    total = sum(map(len, tokens))
    return {
        "layers": layers,
        "n_ctx": n_ctx,
        "questions": len(prompts),
        "vram_gib": round((used - before) / 1024, 2),
        "prompt_tokens_per_s": round(total / bare, 1),
        "scored_tokens_per_s": round(total / scored, 1),
        "time_over_bare_prompt": round(scored / bare, 3),
        "generated_tokens_per_s": round(generated, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--layers", default="16,24,33")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--before", type=float, help="MiB in use before; given by the parent process")
    options = parser.parse_args()
    if options.before is not None:
        row = measure(options.gguf, options.test, options.n_ctx, options.questions, int(options.layers), options.before)
        print("layers:", json.dumps(row), flush=True)
        return
    for layers in options.layers.split(","):
        command = [sys.executable, "-m", "benchmarks.layers", "--gguf", options.gguf, "--test", options.test]
        command += ["--n-ctx", options.n_ctx, "--questions", options.questions]
        subprocess.run([*map(str, command), "--layers", layers, "--before", str(vram_used())], check=True)


if __name__ == "__main__":
    main()
