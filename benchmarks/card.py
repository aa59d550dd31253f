"""Keep the figures of a visit to a CUDA card: from the logs and the rehearsal's files that it brought back.

    python -m benchmarks.card --machine 'NVIDIA H200 (driver 580.159.04), 16 cores, 125 GiB' --commit SHA --date DATE

Reads benchmarks/runs/llama3-8b-t4-rehearsal and the logs of backends, layers and merge.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import HERE, record

RUN, LOGS = HERE / "runs" / "llama3-8b-t4-rehearsal", HERE / "logs"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "llama-cpp-python", "dvc")


def objects(log: Path, name: str) -> list[dict[str, Any]]:
    """What the benchmark `name` printed: the JSON objects on its lines."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [json.loads(line.partition(": ")[2]) for line in lines if line.startswith(f"{name}: ")]


def rehearsal_figures() -> dict[str, tuple[float, str]]:
    """Time, memory and disk of every stage of the last rehearsal, and of all."""
    (*_, last) = json.loads((RUN / "rehearsal.json").read_text(encoding="utf-8"))
    train = json.loads((RUN / "metrics" / "train_resources.json").read_text(encoding="utf-8"))
    evaluate = json.loads((RUN / "metrics" / "evaluate_resources.json").read_text(encoding="utf-8"))
    figures = {
        "rehearsal.wall_s": (round(sum(last["seconds"].values()), 1), "s"),
        "rehearsal.disk_gb": (max(last["peak_disk_gb"].values()), "GB"),
        "quantize.peak_anon_gib": (last["peak_anon_gib"]["quantize"], "GiB"),
        "train.t4.peak_reserved_gib": (round(train["peak_vram_reserved_mib"] / 1024, 3), "GiB"),
        "train.t4.tokens_per_s": (train["tokens_per_second"], "tokens/s"),
        "evaluate.cuda.stage_tokens_per_s": (evaluate["tokens_per_second"], "tokens/s, greedy answers included"),
    }
    for stage in set(last["seconds"]) - {"start"}:
        figures[f"rehearsal.{stage}.wall_s"] = (last["seconds"][stage], "s")
        figures[f"rehearsal.{stage}.peak_anon_gib"] = (last["peak_anon_gib"][stage], "GiB")
        figures[f"rehearsal.{stage}.disk_gb"] = (last["peak_disk_gb"][stage], "GB")
    return figures


def layer_figures(log: Path) -> dict[str, tuple[float, str]]:
    """VRAM and speeds by layers on the card; scoring against the bare prompt with all of them there."""
    rows = objects(log, "layers")
    whole = max(rows, key=lambda row: row["layers"])
    questions = f"{whole['questions']} questions"
    figures = {
        "evaluate.cuda.tokens_per_s": (whole["scored_tokens_per_s"], f"tokens/s, {questions}"),
        "evaluate.cuda.time_over_bare_prompt": (whole["time_over_bare_prompt"], questions),
    }
    for row in rows:
        for name, unit in {
            "vram_gib": "GiB",
            "prompt_tokens_per_s": "tokens/s",
            "generated_tokens_per_s": "tokens/s",
        }.items():
            figures[f"evaluate.cuda.{row['layers']}_layers.{name}"] = (row[name], unit)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--date", required=True)
    options = parser.parse_args()
    pins = (HERE.parent / "constraints-gpu.txt").read_text(encoding="utf-8").split()
    ran = dict(pin.split("==") for pin in pins if "==" in pin)
    about = {"commit": options.commit, "date": options.date}
    about["versions"] = {"python": "3.12.3", **{name: ran[name] for name in PACKAGES}}
    rehearsal = "python -m benchmarks.rehearsal --tokenizer DIR --pubmedqa DIR"
    beside = f"{options.machine}; llama.cpp was compiled beside train, tests ran beside baseline"
    record(rehearsal_figures(), rehearsal, RUN / "rehearsal.log", about | {"hardware": beside})
    log = LOGS / "layers_llama3-8b.log"
    layers = (
        "taskset -c 0-3 python -m benchmarks.layers --gguf FILE --test FILE --layers 33 --questions 500, 24,16 with 20"
    )
    four = options.machine.replace("16 cores", "4 of 16 cores")
    record(layer_figures(log), layers, log, about | {"hardware": four})
    log = LOGS / "merge_llama3-8b.log"
    (merge,) = objects(log, "merge")
    figures = {
        "merge.time_over_copy": (merge["time_over_copy"], ""),
        "merge.peak_anon_gib": (merge["peak_anon_gib"], "GiB"),
    }
    command = "python -m benchmarks.merge --project rehearsal --work DIR"
    record(figures, command, log, about | {"hardware": options.machine})
    log = LOGS / "backends_llama3-8b.log"
    (run,) = objects(log, "backends")
    command = (
        "python -m benchmarks.backends --project rehearsal --profile profiles/llama3-8b.yaml --steps 25 --warm-up 5"
    )
    figures = {
        "train.h200.tokens_per_s": (run["tokens_per_s"], "tokens/s"),
        "train.h200.peak_reserved_gib": (run["peak_reserved_gib"], "GiB"),
    }
    record(figures, command, log, about | {"hardware": options.machine})


if __name__ == "__main__":
    main()
