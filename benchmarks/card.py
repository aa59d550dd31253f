"""Keep the figures of a visit to a CUDA card: from the logs and the rehearsal's files that it brought back.

    python -m benchmarks.card --machine 'NVIDIA H200 (driver 580.159.04), 16 cores, 125 GiB' --commit SHA --date DATE

Reads benchmarks/runs/llama3-8b-t4-rehearsal and llama3-8b-t4-resume, and the logs of backends, baseline, layers, merge
and resume; --parts names those that the visit brought.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import HERE, record

RUN, RESUMED, LOGS = HERE / "runs" / "llama3-8b-t4-rehearsal", HERE / "runs" / "llama3-8b-t4-resume", HERE / "logs"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "llama-cpp-python", "dvc")


def objects(log: Path, name: str) -> list[dict[str, Any]]:
    """What the benchmark `name` printed: the JSON objects on its lines."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [json.loads(line.partition(": ")[2]) for line in lines if line.startswith(f"{name}: ")]


def rehearsal_figures() -> dict[str, tuple[float, str]]:
    """Time, memory and disk of every stage of the last rehearsal, and of all."""
    (*_, last) = json.loads((RUN / "rehearsal.json").read_text(encoding="utf-8"))
    evaluate = json.loads((RUN / "metrics" / "evaluate_resources.json").read_text(encoding="utf-8"))
    figures = {
        "rehearsal.wall_s": (round(sum(last["seconds"].values()), 1), "s"),
        "rehearsal.disk_gb": (max(last["peak_disk_gb"].values()), "GB"),
        "quantize.peak_anon_gib": (last["peak_anon_gib"]["quantize"], "GiB"),
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


def resume_figures(log: Path) -> dict[str, tuple[float, str]]:
    """Training with checkpoints as the T4 profile has it, and what a kill changed: on the tiny base, and at 8B."""
    whole, resumed = (
        json.loads((RESUMED / name / "train_resources.json").read_text(encoding="utf-8"))
        for name in ("whole", "resumed")
    )
    figures = {
        "train.t4.peak_reserved_gib": (round(whole["peak_vram_reserved_mib"] / 1024, 3), "GiB"),
        "train.t4.tokens_per_s": (whole["tokens_per_second"], "tokens/s, 5 checkpoints in 60 steps"),
        "train.t4.resume.peak_reserved_gib": (round(resumed["peak_vram_reserved_mib"] / 1024, 3), "GiB"),
    }
    for row in objects(log, "resume"):
        how = f"of {row['steps']} steps, killed after {row['resumed_after_step']}"
        if "adapter_max_difference" in row:
            key = f"train.resume.{row['backend']}.adapter_max_difference"
            figures[key] = (row["adapter_max_difference"], f"{how}; the tiny base")
        else:
            for when in ("before", "after"):
                key = f"train.t4.resume.loss_difference_{when}_kill"
                figures[key] = (round(row[f"loss_difference_{when}"], 5), f"{how}; two runs' losses, of about 10")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--date", required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}; left out: all")
    options = parser.parse_args()
    pins = (HERE.parent / "constraints-gpu.txt").read_text(encoding="utf-8").split()
    ran = dict(pin.split("==") for pin in pins if "==" in pin)
    about = {"commit": options.commit, "date": options.date}
    about["versions"] = {"python": "3.12.3", **{name: ran[name] for name in PACKAGES}}
    for part in options.parts.split(","):
        figures, command, log, hardware = PARTS[part]()
        record(figures, command, log, about | {"hardware": hardware.format(options.machine)})


Part = tuple[dict[str, tuple[float, str]], str, Path, str]  # figures, command, log, hardware around the machine's


def rehearsal() -> Part:
    command = "python -m benchmarks.rehearsal --tokenizer DIR --pubmedqa DIR"
    beside = "{}; llama.cpp was compiled beside train, tests ran beside train's end, merge, quantize and evaluate"
    return rehearsal_figures(), command, RUN / "rehearsal.log", beside


def resume() -> Part:
    log = LOGS / "resume_gpu.log"
    command = "python -m benchmarks.resume --project DIR --work DIR --after STEP"
    return resume_figures(log), command, log, "{}; llama.cpp was compiled or tests ran beside it"


def baseline() -> Part:
    log = LOGS / "baseline_llama3-8b.log"
    (row,) = objects(log, "baseline")
    figures = {"baseline.cuda.questions_per_s": (row["questions_per_second"], "questions/s, three protocols of 500")}
    command = "python -m benchmarks.rehearsal --tokenizer DIR --pubmedqa DIR baseline"
    return figures, command, log, "{}; a training and tests ran beside it"


def layers() -> Part:
    log = LOGS / "layers_llama3-8b.log"
    command = (
        "taskset -c 0-3 python -m benchmarks.layers --gguf FILE --test FILE --layers 33 --questions 500, 24,16 with 20"
    )
    return layer_figures(log), command, log, "{}, 4 cores in use"


def merge() -> Part:
    log = LOGS / "merge_llama3-8b.log"
    (row,) = objects(log, "merge")
    figures = {
        "merge.time_over_copy": (row["time_over_copy"], ""),
        "merge.peak_anon_gib": (row["peak_anon_gib"], "GiB"),
    }
    return figures, "python -m benchmarks.merge --project rehearsal --work DIR", log, "{}"


def backends() -> Part:
    log = LOGS / "backends_llama3-8b.log"
    (row,) = objects(log, "backends")
    figures = {
        "train.h200.tokens_per_s": (row["tokens_per_s"], "tokens/s"),
        "train.h200.peak_reserved_gib": (row["peak_reserved_gib"], "GiB"),
    }
    command = (
        "python -m benchmarks.backends --project rehearsal --profile profiles/llama3-8b.yaml --steps 25 --warm-up 5"
    )
    return figures, command, log, "{}"


PARTS = {part.__name__: part for part in (rehearsal, resume, baseline, layers, merge, backends)}


if __name__ == "__main__":
    main()
