"""Keep measured figures in benchmarks/results.json; write RESULTS.md and the tables of README.md and docs/hardware.md.

`python -m benchmarks.record` writes all three; with `--check` it fails when one of them is not what it would write.
The check reads the run of the last commit: a user's own run changes metrics/ in the working tree, and is no error.
A figure is a flat key with its value, unit, command, hardware, versions, commit, date and raw log.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.stages.download import PUBMEDQA_SHA256

HERE = Path(__file__).parent
RESULTS, TABLE, FAULTS = HERE / "results.json", HERE / "RESULTS.md", HERE / "faults.json"
README, HARDWARE = HERE.parent / "README.md", HERE.parent / "docs" / "hardware.md"
MARKERS = ("<!-- results: written by benchmarks/record.py -->", "<!-- end of results -->")
STAGE_MARKERS = ("<!-- stages: written by benchmarks/record.py -->", "<!-- end of stages -->")
CARD_MARKERS = ("<!-- card: written by benchmarks/record.py -->", "<!-- end of card -->")
STAGES = {  # what each reads and writes, in words
    "download": ("a mirror, HTTPS, or the simulator", "`data/raw/`"),
    "base": ("the hub, a directory, or nothing", "`models/base/`"),
    "format": ("`data/raw/`, the base's tokenizer", "`data/formatted/*.jsonl`, statistics"),
    "train": ("training and validation questions, base", "`models/adapter/`, loss and memory logs"),
    "merge": ("base, adapter", "`models/merged/`"),
    "quantize": ("merged", "`models/medical-reasoner.gguf`"),
    "evaluate": ("the GGUF, test questions", "predictions and scores"),
    "reference": ("merged, test questions", "predictions at 16 bits: what quantization costs"),
    "baseline": ("base, all questions", "the base's predictions and scores, TF-IDF, majority"),
    "report": ("predictions and metrics", "`metrics/compare.json`, pictures, `models/release/`"),
}
MODELS = ("base", "tuned", "tfidf", "majority")
COSTS = {"wall_s": ",.0f", "peak_anon_gib": ".2f", "disk_gb": ".1f"}  # of a rehearsal's stage, as it is printed
LLAMA_3 = "Meta-Llama-3-8B-Instruct"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "llama-cpp-python", "dvc")


def hardware() -> str:
    """The CPU as the kernel names it, the number of cores in use and the memory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = sum(line.startswith("processor") for line in lines)
    kib = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    return f"{model}, {cores} cores, {kib / 2**20:.0f} GiB"


def record(
    figures: dict[str, tuple[float, str]], command: str, log: Path, elsewhere: dict[str, Any] | None = None
) -> None:
    """Add or replace figures (key -> value and unit), all measured by one command whose output lies in `log`.

    `elsewhere` has the hardware, versions, commit and date of what another machine measured.
    """
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=HERE
    )
    about = {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "log": str(log.relative_to(HERE.parent)),
        **(elsewhere or {}),
    }
    for key, (value, unit) in figures.items():
        results[key] = {"value": value, "unit": unit, **about}
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    TABLE.write_text(table(), encoding="utf-8")


def table() -> str:
    """RESULTS.md: a table of the figures, then what they were measured with."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = [
        "# Measured",
        "",
        "Written by `python -m benchmarks.record` from `results.json`, which also holds the versions of every figure.",
        "",
        "| key | value | hardware | commit | date | command | log |",
        "| --- | --: | --- | --- | --- | --- | --- |",
    ]
    for key, row in sorted(results.items()):
        log = f"[log]({Path(row['log']).relative_to(HERE.name)})"
        cells = (f"`{key}`", f"{row['value']} {row['unit']}".strip(), row["hardware"], row["commit"], row["date"])
        lines.append(f"| {' | '.join([*cells, '`' + row['command'] + '`', log])} |")
    if FAULTS.exists():  # benchmarks/faults.py writes it
        lines += ["", "## Faults", "", "| fault | tried | survived | what the user saw | command |"]
        lines.append("| --- | --: | --: | --- | --- |")
        for row in json.loads(FAULTS.read_text(encoding="utf-8")):
            cells = (row["fault"], row["tried"], row["survived"], row["seen"], f"`{row['command']}`")
            lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def run_name(params: Any, figures: dict[str, Any]) -> str:
    """What a run's base and questions are, by its params.yaml and its metrics/compare.json."""
    base = {"tiny": "tiny Llama", "local": "a local model"}.get(params["base"]["source"])
    if figures["simulated"]:
        data = "simulated trials"
    else:
        real = params["download"]["records"]["sha256"] == PUBMEDQA_SHA256
        data = "the real PubMedQA" if real else "own questions"
    weights = ", random weights" if figures["rehearsal"] else ""
    return f"{base or params['base']['repo_id'].rpartition('/')[2]}{weights}, {data}"


def committed(path: Path) -> str:
    """The text of a file at the last commit; that of the working tree where there is no git repository."""
    command = ["git", "show", f"HEAD:./{path.relative_to(HERE.parent)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    return done.stdout if done.returncode == 0 else working(path)


def working(path: Path) -> str:
    """The text of a file of the working tree."""
    return path.read_text(encoding="utf-8")


def readme(read: Callable[[Path], str]) -> str:
    """README.md with the results of the kept runs and the stages, each between two markers; `read` gives the files."""
    lines = [
        "| | untuned base | tuned, as shipped | difference (95 % interval) | TF-IDF | majority | file |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    names: set[str] = set()
    for run in (HERE.parent, HERE / "runs" / "tiny-pubmedqa"):
        row = json.loads(read(run / "metrics" / "compare.json"))
        params: Any = YAML(typ="safe").load(read(run / "params.yaml"))  # pyright: ignore[reportUnknownMemberType]
        if (name := run_name(params, row)) in names:
            continue
        names.add(name)
        cells = [f"{100 * row[f'{model}_accuracy']:.1f} % / {100 * row[f'{model}_macro_f1']:.1f} %" for model in MODELS]
        low, high = (100 * row[f"tuned_minus_base_accuracy_{end}"] for end in ("low", "high"))
        difference = f"{100 * row['tuned_minus_base_accuracy']:+.1f} ({low:+.1f} to {high:+.1f}) points"
        size = f"{row['gguf_bytes'] / 1e6:,.1f} MB"
        lines.append(f"| {' | '.join([name, *cells[:2], difference, *cells[2:], size])} |")
    if not any(name.startswith(LLAMA_3) for name in names):
        lines.append(f"| {LLAMA_3}, the real PubMedQA | not yet run: see below | | | | | |")
    return between(STAGE_MARKERS, stage_table(), between(MARKERS, lines, read(README)))


def stage_table() -> list[str]:
    """Every stage of dvc.yaml: reads, writes, its sections of params.yaml, and its time in two measured runs."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rehearsed: Any = YAML(typ="safe").load(HERE / "runs/llama3-8b-t4-rehearsal/params.yaml")  # pyright: ignore[reportUnknownMemberType]
    described: Any = YAML(typ="safe").load(HERE.parent / "dvc.yaml")  # pyright: ignore[reportUnknownMemberType]

    def minutes(key: str) -> str:
        if key not in results:
            return ""
        seconds = round(results[key]["value"])
        return f"{seconds // 60}:{seconds % 60:02d}"

    lines = [
        "| stage | reads | writes | parameters | tiny, two cores | 8B, H100 |",
        "| --- | --- | --- | --- | --: | --: |",
    ]
    for stage, about in described["stages"].items():
        sections = ", ".join(f"`{name}`" for name in about["params"] if isinstance(name, str))
        times = [minutes(f"repro.tiny.{stage}.wall_s"), minutes(f"rehearsal.{stage}.wall_s")]
        if stage == "reference" and not rehearsed["reference"]["enabled"]:
            times[1] = "off"
        lines.append(f"| {' | '.join([f'`{stage}`', *STAGES[stage], sections, *times])} |")
    whole = [minutes("repro.tiny.wall_s"), minutes("rehearsal.wall_s")]
    return [*lines, f"| whole run | | | | {' | '.join(whole)} |"]


def between(markers: tuple[str, str], lines: list[str], text: str) -> str:
    """`text` with the lines between two markers replaced."""
    before, rest = text.split(markers[0])
    return "\n".join([before + markers[0], *lines, markers[1] + rest.split(markers[1])[1]])


def card() -> list[str]:
    """What the 8B profile costs by stage, and what a card does with its file: two tables of docs/hardware.md."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))

    def value(key: str, form: str = ",.0f") -> str:
        return format(results[key]["value"], form) if key in results else ""

    disk, memory = results["rehearsal.disk_gb"]["value"], results["quantize.peak_anon_gib"]["value"]
    compared = json.loads((HERE / "runs/llama3-8b-t4-rehearsal/metrics/compare.json").read_text(encoding="utf-8"))
    lines = [
        f"To have ready: {5 * ceil(disk / 5)} GB of free disk beside `.venv` (set-up asks for 16 GB more), a card",
        f"of 6 GB or more (8 GB with `train.offload_embedding: false`), {ceil(memory)} GiB of memory, and `HF_TOKEN`.",
        f"The file that ships has {compared['gguf_bytes'] / 1e9:.1f} GB.",
        "",
        "| stage | time, s | memory of its own, GiB | disk in all, GB | VRAM, GiB |",
        "| --- | --: | --: | --: | --: |",
    ]
    vram = {
        "train": value("train.t4.peak_reserved_gib", ".2f"),
        "evaluate": value("evaluate.cuda.33_layers.vram_gib", ".2f"),
        "baseline": value("evaluate.cuda.33_layers.vram_gib", ".2f"),
    }
    for stage in ("train", "merge", "quantize", "evaluate", "baseline", "report"):
        figures = [value(f"rehearsal.{stage}.{name}", form) for name, form in COSTS.items()]
        lines.append(f"| {' | '.join([f'`{stage}`', *figures, vram.get(stage, '')])} |")
    whole = [value("rehearsal.wall_s"), "", value("rehearsal.disk_gb", ".1f"), ""]
    lines += [f"| {' | '.join(['whole run', *whole])} |", ""]
    lines += [
        "| layers on the card | VRAM, GiB | prompt, tokens/s | generation, tokens/s |",
        "| --: | --: | --: | --: |",
    ]
    for layers, name in {33: "all 33", 24: "24", 16: "16"}.items():
        key = f"evaluate.cuda.{layers}_layers"
        speeds = [value(f"{key}.prompt_tokens_per_s"), value(f"{key}.generated_tokens_per_s", ".1f")]
        lines.append(f"| {' | '.join([name, value(f'{key}.vram_gib', '.2f'), *speeds])} |")
    speed, reserved = value("train.h200.tokens_per_s"), value("train.h200.peak_reserved_gib", ".1f")
    asked, over = (
        value("evaluate.cuda.tokens_per_s"),
        100 * (results["evaluate.cuda.time_over_bare_prompt"]["value"] - 1),
    )
    return [
        *lines,
        "",
        f"On the H200 `profiles/llama3-8b.yaml` (bf16, 24 GB and more, Ampere or newer) trained at {speed} tokens/s",
        f"without checkpoints, in {reserved} GiB. Scoring 500 questions ran at {asked} tokens/s, {over:.0f} % over",
        "reading them.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a page is stale, and write nothing")
    check = parser.parse_args().check
    read = committed if check else working
    pages = {TABLE: table(), README: readme(read), HARDWARE: between(CARD_MARKERS, card(), HARDWARE.read_text("utf-8"))}
    for path, text in pages.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif (read(path) if path == README else working(path)) != text:
            sys.exit(f"{path.name} is not what the measured figures say; run `python -m benchmarks.record`")


if __name__ == "__main__":
    main()
