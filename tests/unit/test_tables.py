"""README's table of results, from the metrics of made-up runs."""

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT
from benchmarks.tables import SMOLLM2, TARGET, result_table, stage_table

OTHER = SMOLLM2.with_name("another-model")
NOTE = "dequantized from a GGUF"
SEEDS = {
    "tuned_accuracy": (0.632, "mean of 5 seeds: [0.63]"),
    "tuned_accuracy_sd": (0.011, ""),
    "tuned_macro_f1": (0.42, ""),
    "tuned_minus_tfidf": (3.8, "points of accuracy (95% interval -1.4 to 9.0)"),
}


def run(directory: Path, base: str, simulated: bool = False, **base_metrics: str) -> dict[Path, str]:
    """The files of a run that the table reads."""
    model = {"accuracy": {"value": 0.5}, "macro_f1": 0.25}
    compared: dict[str, Any] = dict.fromkeys(("base", "tuned", "tfidf", "majority"), model)
    compared |= {"tuned_minus_base": {"accuracy": {"value": 0.1, "low": -0.02, "high": 0.22}}, "gguf": {"bytes": 10**8}}
    compared |= {"simulated": simulated, "rehearsal": False, "data": "PubMedQA PQA-L"}
    return {
        directory / "params.yaml": f"base: {base}",
        directory / "metrics/compare.json": json.dumps(compared),
        directory / "metrics/base.json": json.dumps(base_metrics),
    }


def rows(files: dict[Path, str]) -> tuple[list[str], list[str]]:
    """The first cells of the table, and the lines below it."""
    table = result_table(files.get, [OTHER, SMOLLM2])
    end = table.index("") if "" in table else len(table)
    return [line.split(" | ")[0].removeprefix("| ") for line in table[2:end]], table[end + 1 :]


def test_the_smollm2_run_is_first_and_simulated_data_last() -> None:
    files = run(ROOT, "{source: tiny}", simulated=True) | run(OTHER, "{source: hub, repo_id: A/A-model}")
    names, notes = rows(files | run(SMOLLM2, "{source: hub, repo_id: HuggingFaceTB/SmolLM2}", weights_note=NOTE))
    assert names == [
        "SmolLM2\\*, PubMedQA PQA-L",
        "A-model, PubMedQA PQA-L",
        f"{TARGET}, PubMedQA PQA-L",
        "tiny Llama, simulated trials (**simulated**)",
    ]
    assert notes == [f"\\* Weights from a 4-bit copy: {NOTE}."]
    assert rows(files) == (names[1:], [])


def test_the_cells_are_percent_points_and_megabytes() -> None:
    model, difference = "50.0 % / 25.0 %", "+10.0 (-2.0 to +22.0) points"
    row = result_table(run(ROOT, "{source: tiny}").get, [])[-1]
    assert row.split(" | ")[1:] == [model, model, difference, model, model, "100.0 MB |"]


def test_the_seeds_and_the_file_s_rivals_are_below_the_table() -> None:
    figures = {f"smollm2.{key}": {"value": value, "unit": unit} for key, (value, unit) in SEEDS.items()}
    files = run(SMOLLM2, "{source: hub, repo_id: a/b}") | {RESULTS: json.dumps({"figures": figures})}
    assert rows(files)[1] == [
        "SmolLM2, tuned, mean of 5 seeds: accuracy 63.2 % (standard deviation 1.1), macro-F1 42.0 %.\\\n"
        "Its file minus TF-IDF: 3.8 points of accuracy (95% interval -1.4 to 9.0)."
    ]


def test_a_run_that_was_not_timed_has_no_column() -> None:
    pipeline = "stages: {train: {params: [train]}, errors: {}}"
    timed = {"figures": {"smollm2.train.wall_s": {"value": 61.7, "unit": "s"}}}
    table = stage_table({ROOT / "dvc.yaml": pipeline, RESULTS: json.dumps(timed)}.get)
    assert [line.split(" | ")[4:] for line in table] == [["SmolLM2, GPU |"], ["--: |"], ["1:02 |"], [" |"], [" |"]]
