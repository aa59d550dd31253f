"""The run of profiles/smollm2-135m.yaml where the hub is out of reach: every stage by `dvc repro`, and its variants.

    python -m benchmarks.smollm2_run --model DIR --pubmedqa DIR

`python -m tools.smollm2_weights DIR` makes the model of a 4-bit copy. A local server speaks the hub's protocol and
serves it as the repository and commit that the profile names: only the endpoint, and with it the hashes, differ from a
user's run. Variants have directories beside the run, dvc.yaml's commands and the chat protocol alone: the run's own
merged model quantized with an importance matrix, and four other seeds, which train. `--variants 5` runs them all beside
the run: a small model leaves a card idle, and five trainings take 50 GB of its memory.

Run it again after an interruption, or with other stages, and it continues. When the report is there, parameters, lock
and metrics of the run are kept in benchmarks/runs/smollm2-135m, and mean and spread over the finished seeds in
results.json.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

from ruamel.yaml import YAML

from benchmarks.machine import HERE, LOGS, ROOT, environment
from benchmarks.record import Figures, record
from benchmarks.rehearsal import Shard, Text, prepare, repro, serve
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.core.question import Question
from pipeline.reporting.compare import difference, divergence
from pipeline.scoring.predictions import read_predictions
from pipeline.sections.report import Report
from pipeline.stages.baseline import text_decisions

PROFILE = ROOT / "profiles/smollm2-135m.yaml"
RUN = HERE / "runs/smollm2-135m"
SEEDS = (1, 2, 3, 4)  # besides the profile's
TRAINED = ("train", "merge", "quantize", "evaluate")
QUANTIZED = ("quantize", "evaluate")
MATRIX: dict[str, Any] = {"imatrix_questions": 100, "quant_types": ["Q4_0", "IQ4_NL"]}
CARDS = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")  # the run takes the first, variants all in turn


def variant(
    run: Path, name: str, section: str, changes: dict[str, Any], stages: tuple[str, ...], url: str, card: str
) -> None:
    """Run stages in a directory of their own with a changed section; what an earlier call finished is not run again.

    Without the stage merge, the run's own merged model is used, once it is there.
    """
    directory = run.parent / name
    if not directory.is_dir():
        partial = directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        left_out = ("hub", ".dvc", "merged", "adapter", "release", "*.gguf", "metrics", "*.partial")
        shutil.copytree(run, partial, ignore=shutil.ignore_patterns(*left_out))
        params = YAML().load(partial / "params.yaml")
        params[section] |= changes
        params["evaluate"]["protocols"] = ["chat"]
        if section == "train":  # the types are compared on the run's own training
            params["quantize"]["quant_types"] = params["quantize"]["quant_types"][:1]
        YAML().dump(params, partial / "params.yaml")
        (partial / "metrics").mkdir()
        if "merge" not in stages:
            (partial / "models/merged").symlink_to(run / "models/merged")
        partial.rename(directory)
    while not (directory / "models/merged").exists() and "merge" not in stages:
        time.sleep(1)
    described = YAML(typ="safe").load(directory / "dvc.yaml")["stages"]
    given = environment(HF_ENDPOINT=url, HF_HOME=str(run / "hub"), CUDA_VISIBLE_DEVICES=card)
    for stage in stages:
        done, log = directory / f"{stage}.done", directory / f"{stage}.log"
        if not done.exists():
            with log.open("w", encoding="utf-8") as file:
                command = described[stage]["cmd"]
                subprocess.run(command, shell=True, cwd=directory, env=given, stdout=file, stderr=file, check=True)
            done.touch()


def run_all(run: Path, stages: list[str], url: str, variants: int) -> dict[str, dict[str, float]]:
    """Run stages by `dvc repro`, and `variants` variants at a time beside it; its seconds, memory and disk by stage."""
    status, _ = repro(run, url, ["base", "format"])
    if status:
        sys.exit("smollm2_run: a stage failed; its last lines are above")
    work = [("matrix", "quantize", MATRIX, QUANTIZED), *((f"seed-{s}", "train", {"seed": s}, TRAINED) for s in SEEDS)]
    with ThreadPoolExecutor(max(variants, 1)) as threads:
        turns = zip(work, itertools.cycle(CARDS[1:] + CARDS[:1]))
        beside = [threads.submit(variant, run, *each, url, card) for each, card in turns if variants]
        status, measured = repro(run, url, stages)
        for each in beside:
            each.result()
    if status:
        sys.exit("smollm2_run: a stage failed; its last lines are above")
    return measured


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def figures(run: Path, measured: dict[str, dict[str, float]]) -> Figures:
    """Mean and spread over seeds, the run against its rivals, its files with and without a matrix, seconds by stage."""
    paths = [directory / "metrics/evaluate.json" for directory in (run, *seed_directories(run))]
    chats = [read(path)["chat"] for path in paths if path.exists()]
    accuracies, f1s = [chat["accuracy"]["value"] for chat in chats], [chat["macro_f1"] for chat in chats]
    seeds = f"mean of {len(chats)} seeds"
    found: Figures = {
        "smollm2.base_accuracy": (read(run / "metrics/compare.json")["base"]["accuracy"]["value"], ""),
        "smollm2.tuned_accuracy": (round(mean(accuracies), 4), f"{seeds}: {sorted(accuracies)}"),
        "smollm2.tuned_macro_f1": (round(mean(f1s), 4), f"{seeds}: {sorted(f1s)}"),
    }
    if len(chats) > 1:
        found["smollm2.tuned_accuracy_sd"] = (round(stdev(accuracies), 4), "over seeds")
        found["smollm2.tuned_macro_f1_sd"] = (round(stdev(f1s), 4), "over seeds")
    found |= against_rivals(run) | of_files(run)
    return found | {f"smollm2.{name}.wall_s": (costs["wall_s"], "s") for name, costs in measured.items()}


def against_rivals(run: Path) -> Figures:
    """Accuracy of the run's GGUF minus that of the text baselines on the same questions, with paired intervals."""
    data = run / "data/formatted"
    tuned = read_predictions(run / "metrics/predictions/tuned.csv")["chat"]
    fitting = [*read_rows(data / "train.jsonl", Example), *read_rows(data / "validation_questions.jsonl", Question)]
    questions = sorted(read_rows(data / "test.jsonl", Question), key=lambda row: row.pmid)
    params = Report(**YAML(typ="safe").load(run / "params.yaml")["report"])
    found: Figures = {}
    for name, labels in text_decisions(fitting, questions).items():
        rows = [row._replace(prediction=cast(Any, label)) for row, label in zip(tuned, labels, strict=True)]
        minus = difference(rows, tuned, params)
        value, low, high = (
            round(100 * end, 1) for end in (minus.accuracy.value, minus.accuracy.low, minus.accuracy.high)
        )
        unit = f"points of accuracy ({params.confidence:.0%} interval {low} to {high}, p {minus.mcnemar_p:.2g})"
        found[f"smollm2.tuned_minus_{name}"] = (value, unit)
    return found


def of_files(run: Path) -> Figures:
    """Accuracy, changed decisions and KL against 16 bits of the types that were quantized with a matrix and without."""
    predictions, matrix = run / "metrics/predictions", run.parent / "matrix/metrics/predictions"
    merged = read_predictions(predictions / "merged.csv")["chat"]
    found: Figures = {}
    for quant_type in MATRIX["quant_types"]:
        first = quant_type == MATRIX["quant_types"][0]
        with_matrix = matrix / ("tuned.csv" if first else f"files/{quant_type}.csv")
        for kind, path in (("without", predictions / f"files/{quant_type}.csv"), ("with", with_matrix)):
            if path.exists():
                rows, key = read_predictions(path)["chat"], f"smollm2.imatrix.{quant_type}.{kind}"
                changed = sum(one.prediction != other.prediction for one, other in zip(merged, rows, strict=True))
                found[f"{key}.accuracy"] = (sum(row.prediction == row.label for row in rows) / len(rows), "")
                found[f"{key}.changed"] = (changed, f"of {len(rows)}")
                found[f"{key}.kl"] = (round(divergence(merged, rows), 5), "nats")
    return found


def seed_directories(run: Path) -> list[Path]:
    """The directories of the other seeds."""
    return [run.parent / f"seed-{seed}" for seed in SEEDS]


def keep(run: Path) -> None:
    """Copy parameters, lock, JSON metrics and predictions of the run, and the matrix's predictions, into RUN."""
    chosen = [run / "params.yaml", run / "dvc.lock", *run.glob("metrics/**/*.json")]
    chosen += [*run.glob("metrics/predictions/**/*.csv"), *run.parent.glob("matrix/metrics/predictions/**/*.csv")]
    for path in chosen:
        target = RUN / path.relative_to(run if run in path.parents else run.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="of tools.smollm2_weights")
    parser.add_argument("--pubmedqa", type=Path, required=True, help="a directory with PubMedQA's two files")
    parser.add_argument("--directory", type=Path, default=Path("smollm2-run"), help="where it runs: 6 GB of disk")
    parser.add_argument("--port", type=int, default=8378, help="the same one when an earlier run continues")
    parser.add_argument("--variants", type=int, default=0, help="how many run at a time; 0: none")
    parser.add_argument("stages", nargs="*", help="left out: all")
    options = parser.parse_args()
    run = options.directory.absolute() / "run"
    run.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = YAML(typ="safe").load(PROFILE)
    base = {key: profile["base"][key] for key in ("repo_id", "revision")}
    files: dict[str, Text | Shard] = {
        path.name: Text(path.read_bytes()) for path in options.model.iterdir() if path.is_file()
    }
    with serve(base["repo_id"], base["revision"], files, options.pubmedqa, options.port) as server:
        url = f"http://127.0.0.1:{options.port}"
        prepare(run, PROFILE, base, url)
        found = run_all(run, options.stages, url, options.variants)
        server.shutdown()
    log = options.directory / "measured.json"  # of all calls
    measured = (json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}) | found
    log.write_text(json.dumps(measured), encoding="utf-8")
    if (run / "metrics/compare.json").exists():
        keep(run)
        record(
            figures(run, measured),
            "python -m benchmarks.smollm2_run --model DIR --pubmedqa DIR --variants 5",
            LOGS / "smollm2.log",
        )


if __name__ == "__main__":
    main()
