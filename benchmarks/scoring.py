"""Measure what scoring a question costs over decoding its prompt alone, and what a card of some size can do.

    python -m benchmarks.scoring                  random weights on the CPU; run it after `dvc repro`
    python -m benchmarks.scoring --gguf FILE --test FILE --layers 33,24,16 --questions 500

The first takes the tokenizer of models/base and a Llama of 405 million random weights at Q4_K_M, so that kernels are
the cost and not Python. The second also measures VRAM, with some or all layers on the card, each in a process of its
own. Every question is decoded alone and scored in turn, over --rounds; its fastest times are summed.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.machine import LOGS
from benchmarks.record import Figures, record
from pipeline.core.files import read_rows
from pipeline.core.question import Question
from pipeline.models.gguf import build
from pipeline.models.manifest import Manifest, WeightFile
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.scoring.scorer import Scorer

N_CTX = 2048
GENERATED = 64  # tokens


def random_model(base: Path, directory: Path) -> None:
    """A Llama with the tokenizer of `base` and 405 million random weights in bfloat16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(base)),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        torch_dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, directory / name)


def vram_used() -> float:
    """GiB in use on the first card, by anything; 0 without a card."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    except (OSError, subprocess.CalledProcessError):
        return 0.0


def seconds(action: Callable[[], object]) -> float:
    """The wall time of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(gguf: Path, test: Path, layers: int, questions: int, rounds: int) -> dict[str, tuple[float, str]]:
    """Speeds of one GGUF with `layers` on the card, and the VRAM that they take."""
    os.environ["N_GPU_LAYERS"] = str(layers)
    before = vram_used()
    asked, chat = [PROTOCOLS["chat"].prompt(row) for row in read_rows(test, Question)[:questions]], PROTOCOLS["chat"]
    with Scorer(gguf, N_CTX, "free memory") as scorer:
        prompts = [scorer.encode(messages, chat)[0] for messages in asked]

        def bare(tokens: list[int]) -> None:
            scorer.lib.llama_memory_clear(scorer.lib.llama_get_memory(scorer.context), True)
            scorer.decode(tokens, [], 0)
            scorer.lib.llama_synchronize(scorer.context)

        def generate(tokens: list[int]) -> None:
            for i in range(GENERATED):
                scorer.decode([tokens[i % len(tokens)]], [], len(tokens) + i)
                scorer.lib.llama_synchronize(scorer.context)

        bare(prompts[0])  # the first call allocates
        alone, scored = ([float("inf")] * len(asked) for _ in range(2))
        for _ in range(rounds):
            for i, tokens in enumerate(prompts):
                alone[i] = min(alone[i], seconds(lambda tokens=tokens: bare(tokens)))
                scored[i] = min(scored[i], seconds(lambda i=i: scorer.score(*scorer.encode(asked[i], chat))))
        total = sum(map(len, prompts))
        used = vram_used() - before
        bare(prompts[0])
        return {
            "vram_gib": (round(used, 2), "GiB"),
            "prompt_tokens_per_s": (round(total / sum(alone), 1), "tokens/s"),
            "scored_tokens_per_s": (round(total / sum(scored), 1), "tokens/s"),
            "questions_per_s": (round(len(asked) / sum(scored), 3), "questions/s"),
            "generated_tokens_per_s": (round(GENERATED / seconds(lambda: generate(prompts[0])), 1), "tokens/s"),
            "time_over_bare_prompt": (round(sum(scored) / sum(alone), 3), ""),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--test", type=Path, default=Path("data/formatted/test.jsonl"))
    parser.add_argument("--layers", default="0", help="on the card, comma-separated")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        gguf = options.gguf
        if not gguf:
            directory, gguf = Path(temporary, "model"), Path(temporary, "model.gguf")
            random_model(Path("models/base"), directory)
            size = (directory / "model.safetensors").stat().st_size
            files = [WeightFile(name="model.safetensors", size=size, sha256="0" * 64)]  # only the size is read here
            build(directory, Manifest(source="tiny", files=files), {gguf: "Q4_K_M"}, {}, [])
        for layers in map(int, options.layers.split(",")):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                asked = (gguf, options.test, layers, options.questions, options.rounds)
                found = pool.submit(measure, *asked).result()
            prefix = f"evaluate.cuda.{layers}_layers" if layers else "evaluate.cpu"
            figures |= {f"{prefix}.{name}": row for name, row in found.items() if layers or name != "vram_gib"}
    given = f" --gguf FILE --test FILE --layers {options.layers}" if options.gguf else ""
    command = f"python -m benchmarks.scoring{given} --questions {options.questions} --rounds {options.rounds}"
    record(figures, command, LOGS / ("scoring_cuda.log" if options.gguf else "scoring.log"))


if __name__ == "__main__":
    main()
