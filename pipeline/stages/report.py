"""Report: the predictions of all models -> their comparison, pictures, and what is released beside the GGUF.

Everything that can be computed from predictions is computed here, so that a number of bins or of bootstrap samples
never scores a model again. Every figure in the model card comes from what is read here.
"""

from pathlib import Path

from pipeline.core.records import read_object, sha256, write_csv, write_json
from pipeline.core.stage import read_section, run, writing
from pipeline.models.gguf_header import read_metadata
from pipeline.models.weights import read_manifest
from pipeline.reporting.compare import MEASURES, TEXT_BASELINES, Params, compare, headline, reliability, risk_coverage
from pipeline.reporting.pictures import (
    accuracy_picture,
    confusion_picture,
    draw,
    loss_picture,
    png,
    reliability_picture,
    right_label_picture,
    risk_coverage_picture,
)
from pipeline.reporting.release import NO_RELEASE, REHEARSAL, SIMULATED, Facts, write_release
from pipeline.scoring.measures import read_predictions


def main(
    base: Path,
    tuned: Path,
    merged: Path,
    baseline: Path,
    train_log: Path,
    data: Path,
    source: Path,
    base_model: Path,
    gguf: Path,
    comparison: Path,
    reliability_bins: Path,
    risk_coverage_curves: Path,
    pictures: Path,
    release: Path,
) -> None:
    """Write COMPARISON (flat JSON), two tables for plots, PICTURES (SVG files) and RELEASE (model card and the like).

    BASE, TUNED and MERGED are tables of predictions, BASELINE holds the text baselines' scores, DATA the statistics of
    the splits; SOURCE and the directory BASE_MODEL say where data and base come from.
    """
    params = Params.load("report")
    origin, manifest = read_object(source, "simulated", "name", "licence"), read_manifest(base_model)
    rehearsal = manifest.get("repo_id", "").startswith(REHEARSAL)
    tables = {"base": read_predictions(base), "tuned": read_predictions(tuned)}
    figures = compare(tables["base"], tables["tuned"], read_predictions(merged), params)
    keys = [f"{name}_{score}" for name in TEXT_BASELINES for score in MEASURES]
    text_baselines = read_object(baseline, *keys)
    figures |= {key: text_baselines[key] for key in keys}
    figures |= {"gguf_bytes": gguf.stat().st_size, "simulated": origin["simulated"], "rehearsal": rehearsal}
    note = NO_RELEASE if rehearsal else SIMULATED if origin["simulated"] else origin["name"]
    rows = {"tuned": tables["tuned"]["chat"], "base": headline(tables["base"])}
    bins = {model: reliability(answers, params.bins) for model, answers in rows.items()}
    curves = {model: risk_coverage(answers) for model, answers in rows.items()}
    drawn = {
        "accuracy": accuracy_picture(figures, note),
        "confusion": confusion_picture(rows["base"], rows["tuned"], note),
        "loss": loss_picture(train_log, note),
        "reliability": reliability_picture(bins, note),
        "right_label": right_label_picture(rows["base"], rows["tuned"], note),
        "risk_coverage": risk_coverage_picture(curves, note),
    }
    draw(drawn, pictures)
    columns = ["model", "low", "high", "questions", "confidence", "accuracy"]
    write_csv(reliability_bins, columns, ((model, *bin) for model, found in bins.items() for bin in found))
    points = ((model, *point) for model, curve in curves.items() for point in curve)
    write_csv(risk_coverage_curves, ["model", "coverage", "risk"], points)
    with writing(release) as partial:
        partial.mkdir()
        if rehearsal:
            (partial / "README.md").write_text(f"{NO_RELEASE}\n", encoding="utf-8")
        else:
            training, about = read_section("train"), read_metadata(gguf)
            statistics = read_object(data, "train", "validation", "test", "test_overlap")
            facts = Facts(figures, statistics, training, origin, manifest, about, gguf.name, sha256(gguf))
            write_release(partial, facts, base_model)
            for name in drawn.keys() - {"loss"}:
                (partial / f"{name}.png").write_bytes(png(drawn[name]))
    write_json(comparison, figures)


if __name__ == "__main__":
    run(main)
