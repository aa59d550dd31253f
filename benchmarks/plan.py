"""Compare what `python -m pipeline plan` predicts with what was measured: files, disk and VRAM.

    python -m benchmarks.plan

The constants of pipeline/models/memory.py are fitted to the measurements that are not held out; `fit` says what they
would be. Parameters of the rehearsal are those of its run in benchmarks/runs.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from benchmarks.machine import HERE, LOGS, RESULTS, ROOT
from benchmarks.record import Figures, record
from benchmarks.rehearsal import CONFIG
from pipeline.models.memory import FITTED, GIB, Fitted, Load, Shape, file_size, gguf_vram, stages, training_vram
from pipeline.models.sizes import quantized
from pipeline.sections.train import Train

SHAPE = Shape.of_config(CONFIG, "Llama-3-8B")
REHEARSAL = HERE / "runs" / "llama3-8b-t4-rehearsal"
LONGEST = 887  # tokens of PubMedQA's longest training example with Llama 3's tokenizer: metrics/format.json of that run
SCORED = Load(n_ctx=2048, n_ubatch=512, cache_type="f16", flash_attention=False, n_outputs=65)  # the scorer's, then
CONTEXT = 0.70 * GIB  # of an H200, with kernels and cuBLAS: what is left of the measurement with all layers
BOUNDS = {"file": 0.02, "disk": 0.05, "VRAM": 0.15}


class Row(NamedTuple):
    """A prediction and its measurement, in the unit of the latter."""

    kind: str  # of BOUNDS
    name: str
    predicted: float
    measured: float
    held_out: bool  # no constant was fitted to it

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.predicted / self.measured - 1


class Trained(NamedTuple):
    """A measured training: changes of a profile's section `train`, and GiB."""

    name: str
    params: Train
    measured: float
    held_out: bool = False

    def predicted(self, fitted: Fitted) -> float:
        """GiB."""
        return training_vram(SHAPE, self.params, LONGEST, fitted) / GIB


def figures() -> dict[str, float]:
    """Key -> value of results.json."""
    return {key: row["value"] for key, row in json.loads(RESULTS.read_text("utf-8"))["figures"].items()}


def rehearsal() -> dict[str, Any]:
    """Parameters of the rehearsal."""
    return YAML(typ="safe").load(REHEARSAL / "params.yaml")


def section(params: dict[str, Any], **changes: Any) -> Train:
    """The section `train` of a run, which may be older than the model of today's section."""
    return Train.model_construct(**params["train"] | changes)


def trainings(found: dict[str, float], rehearsed: dict[str, Any]) -> list[Trained]:
    """All measured trainings; the T4 profile's is held out."""
    profile = YAML(typ="safe").load(ROOT / "profiles" / "llama3-8b.yaml")
    rows = [Trained("llama3-8b", section(profile), found["train.h200.peak_reserved_gib"])]
    for backend in ("unsloth", "trl"):
        for size, accumulation in ((2, 4), (4, 2), (8, 1)):
            name = f"{backend}.{size}x{accumulation}"
            changes = {"backend": backend, "per_device_train_batch_size": size, "gradient_checkpointing": True}
            rows.append(Trained(name, section(profile, **changes), found[f"train.h200.{name}.peak_reserved_gib"]))
    # measured on an H200 too, before logs were kept
    for name, checkpointing, gib in (("unsloth.32x1", True, 8.7), ("unsloth.32x1, none", False, 57.8)):
        changes = {"per_device_train_batch_size": 32, "gradient_checkpointing": checkpointing}
        rows.append(Trained(name, section(profile, **changes), gib))
    return [*rows, Trained("llama3-8b-t4", section(rehearsed), found["rehearsal.train.vram_gib"], held_out=True)]


def fit(rows: Iterable[Trained]) -> Fitted:
    """The constants with the least squares of relative errors over `rows`."""
    from scipy.optimize import least_squares

    kept = list(rows)

    def errors(values: Any) -> list[float]:
        return [row.predicted(Fitted(*values)) / row.measured - 1 for row in kept]

    return Fitted(*(round(float(value), 3) for value in least_squares(errors, FITTED).x))


def comparisons() -> list[Row]:
    """Every prediction that can be compared."""
    found, rehearsed = figures(), rehearsal()
    quantize = rehearsed["quantize"]
    types = quantize.get("quant_types") or [quantize["quant_type"]]
    tensors = quantized(SHAPE, types, bool(quantize.get("imatrix_questions")))
    files = [file_size(tensors[name], SHAPE) for name in types]
    rows = [Row("file", f"{types[0]}, GB", files[0] / 1e9, found["rehearsal.gguf_gb"], held_out=True)]
    optional = ["reference"] if rehearsed["reference"]["enabled"] else []
    needs = stages(SHAPE, {"train": section(rehearsed)}, 2 * SHAPE.parameters, files, optional, on_card=True)
    del needs["baseline"]  # the rehearsal ran it last, beside a merged model; now it runs before train
    for stage, need in needs.items():
        rows.append(Row("disk", f"{stage}, GB", need.disk / 1e9, found[f"rehearsal.{stage}.disk_gb"], held_out=True))
    for layers in (33, 24, 16):
        predicted = (gguf_vram(tensors[types[0]], SHAPE, SCORED, layers) + CONTEXT) / GIB
        measured = found[f"evaluate.cuda.{layers}_layers.vram_gib"]
        rows.append(Row("VRAM", f"{types[0]}, {layers} of 33 layers, GiB", predicted, measured, layers != 33))
    for row in trainings(found, rehearsed):
        rows.append(Row("VRAM", f"train {row.name}, GiB", row.predicted(FITTED), row.measured, row.held_out))
    return rows


def left_out(rows: list[Trained]) -> dict[str, float]:
    """Name of each training -> the error of its prediction by a fit to all others."""
    errors: dict[str, float] = {}
    for left in rows:
        fitted = fit(row for row in rows if row is not left)
        errors[left.name] = left.predicted(fitted) / left.measured - 1
    return errors


def main() -> None:
    rows, trained = comparisons(), trainings(figures(), rehearsal())
    alone = left_out(trained)
    largest = {kind: max(abs(row.error) for row in rows if row.kind == kind) for kind in BOUNDS}
    largest["VRAM"] = max(largest["VRAM"], *map(abs, alone.values()))
    lines = [f"{'what':45}{'predicted':>10}{'measured':>10}{'error':>9}"]
    for row in rows:
        error = f"{row.error:+9.1%}{'  held out' * row.held_out}"
        lines.append(f"{row.kind:6}{row.name:39}{row.predicted:10.3f}{row.measured:10.3f}{error}")
    lines.append(f"fit without what is held out: {fit(row for row in trained if not row.held_out)}")
    lines += [f"train {name}, left out of the fit: {error:+.1%}" for name, error in alone.items()]
    unit = "of the measurement, each training left out of the fit in turn"
    measured: Figures = {"plan.largest_error": (round(max(largest.values()), 4), unit)}
    measured |= {f"plan.{kind.lower()}.largest_error": (round(error, 4), unit) for kind, error in largest.items()}
    record(measured, "python -m benchmarks.plan", LOGS / "plan.log", text="\n".join(lines))


if __name__ == "__main__":
    main()
