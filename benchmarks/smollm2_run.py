"""The run of profiles/smollm2-135m.yaml where the hub is out of reach: every stage by `dvc repro`, then other seeds.

    python -m benchmarks.smollm2_run --model DIR --pubmedqa DIR --seeds 1 2 3 4

DIR is what `python -m tools.smollm2_weights DIR` makes of a 4-bit copy. A local server speaks the hub's protocol and
serves it as the repository and commit that the profile names: only the endpoint, and with it the hashes, differ from a
user's run. The seeds change `train.seed` alone; each trains, merges, quantizes and is evaluated with the chat protocol
in a directory beside the run. Run it again after an interruption and it continues. The results of the run go into
benchmarks/runs/smollm2-135m, and mean and spread over all seeds into results.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ruamel.yaml import YAML

from benchmarks.machine import HERE, LOGS, ROOT, environment
from benchmarks.record import Figures, record
from benchmarks.rehearsal import Text, prepare, repro, serve

PROFILE = ROOT / "profiles/smollm2-135m.yaml"
RUN = HERE / "runs/smollm2-135m"
PARTS = ("train", "merge", "quantize", "evaluate")  # of a seed; in their own directory, by dvc.yaml's commands


def stage(directory: Path, name: str, url: str) -> None:
    """Run the command that dvc.yaml has for a stage."""
    command = YAML(typ="safe").load(directory / "dvc.yaml")["stages"][name]["cmd"]
    given = environment(HF_ENDPOINT=url, HF_HOME=str(directory.parent / "run/hub"))
    log = directory / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, shell=True, cwd=directory, env=given, stdout=file, stderr=file, check=False)
    if done.returncode:
        sys.exit(f"smollm2_run: {name} of {directory.name} failed; see {log}")


def seed_directory(run: Path, seed: int) -> Path:
    """A copy of the run's code, data and base in which `train.seed` is `seed` and chat is the only protocol."""
    directory = run.parent / f"seed-{seed}"
    if not directory.is_dir():
        partial = directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        kept = shutil.ignore_patterns("hub", "cache", "tmp", "merged", "adapter", "release", "*.gguf", "metrics")
        shutil.copytree(run, partial, ignore=kept)
        params = YAML().load(partial / "params.yaml")
        params["train"]["seed"], params["evaluate"]["protocols"] = seed, ["chat"]
        YAML().dump(params, partial / "params.yaml")
        (partial / "metrics").mkdir()
        partial.rename(directory)
    return directory


def other_seed(run: Path, seed: int, url: str) -> dict[str, Any]:
    """The figures of metrics/evaluate.json of another seed; what an earlier call finished is not run again."""
    directory = seed_directory(run, seed)
    for name in PARTS:
        if not (directory / f"{name}.done").exists():
            stage(directory, name, url)
            (directory / f"{name}.done").touch()
    return json.loads((directory / "metrics/evaluate.json").read_text(encoding="utf-8"))


def keep(run: Path) -> None:
    """Copy parameters, lock and JSON and CSV metrics of the run into benchmarks/runs."""
    for path in [run / "params.yaml", run / "dvc.lock", *run.glob("metrics/**/*.json"), *run.glob("metrics/**/*.csv")]:
        target = RUN / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="of tools.smollm2_weights")
    parser.add_argument("--pubmedqa", type=Path, required=True, help="a directory with PubMedQA's two files")
    parser.add_argument("--directory", type=Path, default=Path("smollm2-run"), help="where it runs: 4 GB of disk")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="besides the profile's")
    parser.add_argument("--port", type=int, default=8378, help="the same one when an earlier run continues")
    parser.add_argument("--targets", nargs="*", default=[], help="stages; left out: all, and the figures are recorded")
    options = parser.parse_args()
    run = options.directory.absolute() / "run"
    run.mkdir(parents=True, exist_ok=True)
    base = {key: YAML(typ="safe").load(PROFILE)["base"][key] for key in ("repo_id", "revision")}
    files = {path.name: Text(path.read_bytes()) for path in options.model.iterdir() if path.is_file()}
    with serve(base["repo_id"], base["revision"], files, options.pubmedqa, options.port) as server:
        url = f"http://127.0.0.1:{options.port}"
        prepare(run, PROFILE, base, url)
        status, measured = repro(run, url, options.targets)
        if status:
            sys.exit("smollm2_run: a stage failed; its last lines are above")
        if options.targets:
            return
        keep(run)
        headline = json.loads((run / "metrics/evaluate.json").read_text(encoding="utf-8"))
        found = [headline, *(other_seed(run, seed, url) for seed in options.seeds)]
        server.shutdown()
    print(json.dumps(found, indent=1))
    chats = [each["chat"] for each in found]
    accuracies, f1s = [chat["accuracy"]["value"] for chat in chats], [chat["macro_f1"] for chat in chats]
    compared = json.loads((run / "metrics/compare.json").read_text(encoding="utf-8"))
    seeds = f"mean of {len(found)} seeds"
    figures: Figures = {
        "smollm2.base_accuracy": (compared["base"]["accuracy"]["value"], ""),
        "smollm2.tuned_accuracy": (round(mean(accuracies), 4), f"{seeds}; {sorted(accuracies)}"),
        "smollm2.tuned_macro_f1": (round(mean(f1s), 4), f"{seeds}; {sorted(f1s)}"),
    }
    if len(found) > 1:
        figures["smollm2.tuned_accuracy_sd"] = (round(stdev(accuracies), 4), "over seeds")
    figures |= {f"smollm2.{name}.wall_s": (costs["wall_s"], "s") for name, costs in measured.items()}
    command = f"python -m benchmarks.smollm2_run --model DIR --pubmedqa DIR --seeds {' '.join(map(str, options.seeds))}"
    record(figures, command, LOGS / "smollm2.log", text=json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
