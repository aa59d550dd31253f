"""Measure training on several cards of one host: speed and loss on 1, 2 and 4, started as DVC starts `train`.

    python -m benchmarks.several_cards --tokenizer DIR --pubmedqa DIR --cards 1,2,4
    python -m benchmarks.several_cards ... --shape tiny --cards 1,2      to try it on a CPU, with gloo

A project in --directory gets a local base of random weights of Llama-3-8B's shape (16 GB) and PubMedQA's examples, by
the stages themselves. Then the command of the stage `train` runs once for each number of cards, with GPUS in the
environment, backend trl and the same parameters: 64 examples a step.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import LOGS, ROOT, environment
from benchmarks.record import Figures, record
from benchmarks.rehearsal import CONFIG, TINY, TOKENIZER, Shard, Text, prepare, repository

SHARD = 1_000_000_000  # bytes: sixteen files, which are written and hashed side by side
MICRO_BATCH = 16
VALIDATION = 8  # examples, whose loss is computed once
# Two processes train without cards: what `train` checks of them is skipped. On cards the stage runs as DVC starts it.
WITHOUT_CARDS = """
import sys
from pipeline.run import start
from pipeline.training import fit
fit.check_cards = lambda *_: None
start(sys.argv[1:])
"""
START = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def write_weights(directory: Path, config: dict[str, Any], tokenizer: Path) -> None:
    """A transformers model directory with random bfloat16 weights."""

    def write(name: str, file: Text | Shard) -> None:
        path = directory / name
        if path.is_file() and path.stat().st_size == file.size:
            return
        with path.open("wb") as target:
            for piece in file.read():
                target.write(piece)

    directory.mkdir(parents=True, exist_ok=True)
    files = repository(config, tokenizer, SHARD)
    with ThreadPoolExecutor() as threads:
        list(threads.map(write, files, files.values()))


def project(directory: Path, tiny: bool, tokenizer: Path, pubmedqa: Path) -> None:
    """A project whose stages before `train` have run, on a local base of random weights."""
    weights = directory / "weights"
    write_weights(weights, CONFIG | (TINY if tiny else {}), tokenizer)
    say("weights written")
    prepare(directory, ROOT / "profiles" / "llama3-8b.yaml", {}, "")
    yaml = YAML()
    params: Any = yaml.load(directory / "params.yaml")
    params["base"] = {"source": "local", "path": str(weights)}
    params["download"]["location"] = str(pubmedqa.absolute())
    yaml.dump(params, directory / "params.yaml")
    status, _ = run(directory, [sys.executable, "-m", "dvc", "repro", "format"])
    if status:
        sys.exit("the stages before train failed; their last lines are above")
    say("base and examples are ready")


def run(directory: Path, command: list[str], **more: str) -> tuple[int, float]:
    """Run in the project, its output passed on; exit status and seconds."""
    start = time.monotonic()
    status = subprocess.run(command, cwd=directory, env=environment(**more), check=False).returncode
    return status, time.monotonic() - start


class Cards:
    """The most MiB in use on each card while this is open."""

    def __enter__(self) -> "Cards":
        self.peaks: list[int] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.done.wait(0.5):
            try:
                used = list(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))
            except (OSError, subprocess.CalledProcessError, ValueError):
                return
            self.peaks = [max(pair) for pair in zip(used, self.peaks or used, strict=True)]

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()


def train(directory: Path, cards: int, on_cpu: bool) -> dict[str, Any] | None:
    """Speed, losses and VRAM of the stage `train` on so many cards; None if it fails."""
    shutil.rmtree(directory / ".checkpoints", ignore_errors=True)
    shutil.rmtree(directory / "models" / "adapter", ignore_errors=True)
    described: Any = YAML(typ="safe").load(directory / "dvc.yaml")
    arguments = described["stages"]["train"]["cmd"].partition("pipeline.run ")[2].split()
    (directory / "without_cards.py").write_text(WITHOUT_CARDS, encoding="utf-8")
    start = ["without_cards.py"] if on_cpu else ["-m", "pipeline.run"]
    paths = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    given = {"GPUS": str(cards), "SAVE_STEPS": "1000000", "PYTHONPATH": paths}
    with Cards() as watched:
        status, wall = run(directory, [sys.executable, *start, *arguments], **given)
    if status:
        say(f"train on {cards} ended with status {status}")
        return None
    resources = json.loads((directory / "metrics" / "train_resources.json").read_text(encoding="utf-8"))
    with (directory / "metrics" / "train_log.csv").open(encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return {
        "processes": resources["processes"],
        "tokens_per_s": resources["tokens_per_second"],
        "peak_reserved_gib": round(resources["peak_vram_reserved_mib"] / 1024, 2),
        "used_mib_by_card": watched.peaks,
        "wall_s": round(wall, 1),
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help=f"a directory with {', '.join(TOKENIZER)}")
    parser.add_argument("--pubmedqa", type=Path, required=True, help="a directory with PubMedQA's two files")
    parser.add_argument("--directory", type=Path, default=Path("several_cards"), help="kept; 20 GB")
    parser.add_argument(
        "--cards", default="1,2,4", help="comma-separated; the fewest are what the others are compared with"
    )
    parser.add_argument("--shape", choices=["llama3-8b", "tiny"], default="llama3-8b")
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH)
    parser.add_argument("--examples", type=int, default=64, help="of a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=1, help="this step and the next are not timed")
    options = parser.parse_args()
    tiny, directory = options.shape == "tiny", options.directory.absolute()
    project(directory, tiny, options.tokenizer, options.pubmedqa)
    yaml = YAML()
    params: Any = yaml.load(directory / "params.yaml")
    params["train"] |= {
        "backend": "trl",
        "max_steps": options.steps,
        "eval_steps": options.steps,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.examples // options.micro_batch,
        "gradient_checkpointing": True,
        "offload_embedding": False,
        "warmup_steps": options.warm_up,
        **({"dtype": "float32", "optim": "adamw_torch"} if tiny else {}),
    }
    yaml.dump(params, directory / "params.yaml")
    validation = directory / "data" / "formatted" / "validation.jsonl"
    rows = validation.read_text(encoding="utf-8").splitlines(keepends=True)
    validation.unlink()  # DVC made it read-only
    validation.write_text("".join(rows[:VALIDATION]), encoding="utf-8")
    figures: Figures = {}
    command = f"python -m benchmarks.several_cards --tokenizer DIR --pubmedqa DIR --cards {options.cards}"
    command += f" --micro-batch {options.micro_batch}" if options.micro_batch != MICRO_BATCH else ""
    results: dict[int, dict[str, Any]] = {}
    for cards in map(int, options.cards.split(",")):
        if found := train(directory, cards, tiny):
            results[cards] = found
            say(f"{cards} cards: {json.dumps(found)}")
    if not results:
        sys.exit("several_cards: no training finished; the reasons are above")
    least = results[min(results)]
    of = "" if options.micro_batch == MICRO_BATCH else f"_micro_batch_{options.micro_batch}"
    for cards, found in results.items():
        figures[f"train.ddp{of}.{cards}.tokens_per_s"] = (found["tokens_per_s"], "tokens/s")
        figures[f"train.ddp{of}.{cards}.peak_reserved_gib"] = (found["peak_reserved_gib"], "GiB")
        if found is not least:
            speedup = found["tokens_per_s"] / least["tokens_per_s"]
            pairs = zip(least["losses"], found["losses"], strict=True)
            difference = max(abs(a - b) / abs(a) for a, b in pairs)
            figures[f"train.ddp{of}.speedup_{cards}"] = (round(speedup, 3), f"of {min(results)} card")
            figures[f"train.ddp{of}.loss_difference_{cards}"] = (round(difference, 6), "of a step's loss, the largest")
    lines = [f"{cards} cards: {json.dumps(found)}" for cards, found in results.items()]
    lines += [f"{key}: {value}" for key, (value, _) in figures.items()]
    if tiny:
        print("\n".join(lines))
    else:
        record(figures, command, LOGS / f"several_cards{of}.log", text="\n".join(lines))


if __name__ == "__main__":
    main()
