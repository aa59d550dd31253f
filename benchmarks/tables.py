"""The tables of README.md and docs/hardware.md: results.json and the metrics of the kept runs, in Markdown."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import HERE, RESULTS, ROOT

README, HARDWARE = ROOT / "README.md", ROOT / "docs" / "hardware.md"
STAGES = {  # what each reads and writes, in words
    "download": ("a mirror, HTTPS, or the simulator", "`data/raw/`"),
    "base": ("the hub, a directory, or the shipped tiny Llama", "`models/base/`"),
    "format": ("`data/raw/`, the base's tokenizer", "`data/formatted/`, statistics"),
    "artificial": (
        "PQA-A from the hub, test questions; nothing without a first phase",
        "`data/artificial.jsonl`, what was left out",
    ),
    "pretrain": ("artificial examples, base", "`models/pretrained/`, loss and memory logs"),
    "train": ("training and validation examples, base", "`models/adapter/`, loss and memory logs"),
    "merge": ("base, adapter", "`models/merged/`"),
    "quantize": ("merged model, training questions", "`models/medical-reasoner.gguf`, `models/quantized/`"),
    "evaluate": ("GGUF files, test questions", "predictions and scores"),
    "reference": ("merged model, test questions", "predictions at 16 bits"),
    "baseline": ("base, all questions", "predictions and scores of the base, TF-IDF, majority"),
    "generate": ("base, GGUF, test questions", "`data/answers.jsonl`: written answers of both models"),
    "report": ("predictions, answers and metrics", "`metrics/compare.json`, pictures, `models/release/`"),
}
COSTS = {"wall_s": ",.0f", "peak_anon_gib": ".2f", "disk_gb": ".1f"}  # of a stage, as they are printed
SPEEDS = {"vram_gib": ".2f", "prompt_tokens_per_s": ",.0f", "generated_tokens_per_s": ".1f"}
FACTS = (
    ("most disk in use, without `.venv`, GB", "rehearsal.disk_gb", ".1f"),
    ("the GGUF, GB", "rehearsal.gguf_gb", ".2f"),
    ("VRAM of training, `llama3-8b-t4`, GiB", "train.t4.peak_reserved_gib", ".2f"),
    ("VRAM of training, `llama3-8b`, GiB", "train.h200.peak_reserved_gib", ".2f"),
    ("training on the H200, `llama3-8b`, tokens/s", "train.h200.tokens_per_s", ",.0f"),
    ("the same with 32 examples a step", "train.batch32.tokens_per_s", ",.0f"),
    ("scoring on the H200, tokens/s", "evaluate.cuda.33_layers.scored_tokens_per_s", ",.0f"),
    ("its time over decoding the prompts alone", "evaluate.cuda.33_layers.time_over_bare_prompt", ".2f"),
)
MODELS = ("base", "tuned", "tfidf", "majority")  # keys of metrics/compare.json
TARGET = "Meta-Llama-3-8B-Instruct"
TIMED = {"tiny, two cores": "repro.tiny", "SmolLM2, GPU": "smollm2", "8B, H100": "rehearsal"}  # columns -> runs
SMOLLM2 = HERE / "runs" / "smollm2-135m"  # by benchmarks/smollm2_run.py

Read = Callable[[Path], str | None]  # the text of a file, None if it is not there

NEW = ("", "")  # a stage without a description here


def figures_in(read: Read) -> dict[str, Any]:
    """The figures of results.json as `read` gives it."""
    return json.loads(read(RESULTS) or "{}").get("figures", {})


def metrics_in(run: Path, name: str, read: Read) -> dict[str, Any]:
    """A file of a run's metrics; empty if it is not there."""
    return json.loads(read(run / "metrics" / f"{name}.json") or "{}")


def run_row(run: Path, read: Read) -> tuple[tuple[bool, bool, bool, str], str] | None:
    """A run's row for README with its place among the others; None without comparable metrics in today's format."""
    values = metrics_in(run, "compare", read)
    if not isinstance(values.get("tuned"), dict) or values["rehearsal"]:
        return None
    base = YAML(typ="safe").load(read(run / "params.yaml"))["base"]
    tiny, simulated = base["source"] == "tiny", values["simulated"]
    local = "a local model" if run == ROOT else run.name
    model = "tiny Llama" if tiny else local if base["source"] == "local" else base["repo_id"].rpartition("/")[2]
    noted = "\\*" if "weights_note" in metrics_in(run, "base", read) else ""
    name = f"{model}{noted}, {'simulated trials (**simulated**)' if simulated else values['data']}"
    cells = [f"{100 * values[m]['accuracy']['value']:.1f} % / {100 * values[m]['macro_f1']:.1f} %" for m in MODELS]
    value, low, high = (100 * values["tuned_minus_base"]["accuracy"][end] for end in ("value", "low", "high"))
    cells.insert(2, f"{value:+.1f} ({low:+.1f} to {high:+.1f}) points")
    cells.append(f"{values['gguf']['bytes'] / 1e6:,.1f} MB")
    return (simulated, tiny, run != SMOLLM2, name), f"| {' | '.join([name, *cells])} |"


def smollm2_notes(read: Read) -> list[str]:
    """Below the table: where the weights of the SmolLM2 run came from, and mean and spread over its seeds."""
    note, figures = metrics_in(SMOLLM2, "base", read).get("weights_note"), figures_in(read)
    lines = [f"\\* Weights from a 4-bit copy: {note}."] if note else []
    mean, spread = (figures.get(f"smollm2.{key}") for key in ("tuned_accuracy", "tuned_accuracy_sd"))
    if mean and spread:  # of several seeds
        f1 = figures["smollm2.tuned_macro_f1"]["value"]
        lines.append(
            f"SmolLM2, tuned, {mean['unit'].partition(':')[0]}: accuracy {100 * mean['value']:.1f} % "
            f"(standard deviation {100 * spread['value']:.1f}), macro-F1 {100 * f1:.1f} %."
        )
    for name, rival in (("majority", "the majority answer"), ("tfidf", "TF-IDF")):
        if minus := figures.get(f"smollm2.tuned_minus_{name}"):
            lines.append(f"Its file minus {rival}: {minus['value']} {minus['unit']}.")
    return ["", "\\\n".join(lines)] if lines else []


def result_table(read: Read, runs: Iterable[Path]) -> list[str]:
    """The committed runs: real models first, simulated data last."""
    found = [row for run in (ROOT, *sorted(runs)) if (row := run_row(run, read))]
    rows = dict(reversed(found))  # of two runs of the same name, the project's own
    if not any(name.startswith(TARGET) for *_, name in rows):
        rows[False, False, True, f"~{TARGET}"] = f"| {TARGET}, PubMedQA PQA-L | not run yet: see below | | | | | |"
    return [
        "| | untuned base | tuned, as shipped | difference (95 % interval) | TF-IDF | majority | file |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        *(row for _, row in sorted(rows.items())),
        *smollm2_notes(read),
    ]


def stage_table(read: Read) -> list[str]:
    """Each stage of dvc.yaml: what it reads and writes, its sections of params.yaml, and its times where measured."""
    times = {
        key: f"{round(row['value']) // 60}:{round(row['value']) % 60:02d}"
        for key, row in figures_in(read).items()
        if key.endswith(".wall_s")
    }
    timed = {title: run for title, run in TIMED.items() if f"{run}.train.wall_s" in times}
    lines = [
        f"| {' | '.join(['stage', 'reads', 'writes', 'parameters', *timed])} |",
        f"| {' | '.join(['---'] * 4 + ['--:'] * len(timed))} |",
    ]
    for stage, about in YAML(typ="safe").load(read(ROOT / "dvc.yaml"))["stages"].items():
        sections = ", ".join(f"`{name}`" for name in about.get("params", ()) if isinstance(name, str))
        cells = [times.get(f"{run}.{stage}.wall_s", "") for run in timed.values()]
        lines.append(f"| {' | '.join([f'`{stage}`', *STAGES.get(stage, NEW), sections, *cells])} |")
    whole = [times.get(f"{run}.wall_s", "") for run in timed.values()]
    return [*lines, f"| {' | '.join(['whole run', '', '', '', *whole])} |"]


def card_tables(read: Read) -> list[str]:
    """What the 8B profile costs, by stage, and what a card does with its file."""
    figures = figures_in(read)

    def row(name: str, cells: Iterable[tuple[str, str]]) -> str:
        values = (format(figures[key]["value"], form) if key in figures else "" for key, form in cells)
        return f"| {' | '.join([name, *values])} |"

    measured = [stage for stage in STAGES if f"rehearsal.{stage}.wall_s" in figures]
    stages = {stage: f"rehearsal.{stage}" for stage in measured} | {"whole run": "rehearsal"}
    layers = {name: f"evaluate.cuda.{name}_layers" for name in ("33", "24", "16")}
    return [
        "| what | measured |",
        "| --- | --: |",
        *(row(name, [(key, form)]) for name, key, form in FACTS),
        "",
        "| stage | time, s | anonymous memory, GiB | disk in all, GB |",
        "| --- | --: | --: | --: |",
        *(row(name, [(f"{key}.{cost}", form) for cost, form in COSTS.items()]) for name, key in stages.items()),
        "",
        "| of 33 layers on the card | VRAM, GiB | prompt, tokens/s | generation, tokens/s |",
        "| --: | --: | --: | --: |",
        *(row(name, [(f"{key}.{speed}", form) for speed, form in SPEEDS.items()]) for name, key in layers.items()),
    ]


def between(name: str, lines: list[str], text: str) -> str:
    """`text` with the lines between the two markers of that name replaced."""
    first, last = f"<!-- {name}: written by benchmarks/record.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(first)
    return "\n".join([before + first, *lines, last + rest.split(last)[1]])


def pages(read: Read) -> dict[Path, tuple[str, str]]:
    """Each page: its text as `read` gives it, and as it has to be."""
    readme, cards = read(README) or "", read(HARDWARE) or ""
    text = between(
        "stages", stage_table(read), between("results", result_table(read, (HERE / "runs").iterdir()), readme)
    )
    return {README: (readme, text), HARDWARE: (cards, between("card", card_tables(read), cards))}
