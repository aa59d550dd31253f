"""Report: the predictions of all models -> their comparison, plots, and what is released beside the GGUF.

Everything that can be computed from predictions is computed here, so that a change of the number of bins or of
bootstrap samples scores no model again.
"""

from pathlib import Path

from pydantic import BaseModel

from pipeline.core.facts import Conclusion, QuestionFacts
from pipeline.core.files import read_as, read_rows, sha256
from pipeline.core.outputs import write_json, writing
from pipeline.core.params import load_params
from pipeline.core.source import Source
from pipeline.models.gguf_header import read_header
from pipeline.models.manifest import read_manifest
from pipeline.models.quantized import by_type, read_sums
from pipeline.models.training import Training
from pipeline.reporting.answers import measured_answers
from pipeline.reporting.compare import compare, file_choice
from pipeline.reporting.comparison import NO_RELEASE, File, Quality, Subject
from pipeline.reporting.plots import make_curves, make_pictures, png, write_curves, write_svgs
from pipeline.reporting.release import Facts, Splits, write_release
from pipeline.scoring.answers import read_answers
from pipeline.scoring.base_protocol import Choice
from pipeline.scoring.measures import rounded
from pipeline.scoring.predictions import read_predictions
from pipeline.sections.report import Report

REHEARSAL = "rehearsal/"  # prefix of the repository of a base of random weights (benchmarks/rehearsal.py)


class Baselines(BaseModel):  # what is read of metrics/baseline.json
    base_protocol: Choice
    tfidf: Quality
    majority: Quality


def main(
    metrics: Path,
    source: Path,
    facts: Path,
    base: Path,
    training: Path,
    gguf: Path,
    quantized: Path,
    matrix: Path,
    answers: Path,
    conclusions: Path,
    release: Path,
) -> None:
    """Write METRICS/compare.json, METRICS/curves (CSV files), METRICS/pictures (SVG files) and RELEASE.

    METRICS also has the inputs: predictions of base, tuned and merged model, baseline.json, format.json and
    train_log.csv. SOURCE says where the data come from, FACTS what the test questions are like, the directory BASE what
    the base is, TRAINING how it was tuned. QUANTIZED has the files beside GGUF, MATRIX their importance matrix. ANSWERS
    are the written ones of both models, CONCLUSIONS the authors' to compare them with.
    """
    params, questions = load_params("report", Report), read_header(matrix).metadata["imatrix.chunk_count"]
    origin, manifest = read_as(Source, source), read_manifest(base)
    subject = Subject(
        data=origin.name,
        simulated=origin.simulated,
        rehearsal=manifest.repo_id.startswith(REHEARSAL),
        gguf=File(bytes=gguf.stat().st_size, sha256=sha256(gguf)),
        **dict(read_as(Baselines, metrics / "baseline.json")),
        answers=measured_answers(read_answers(answers), read_rows(conclusions, Conclusion), params),
    )
    of_base, of_tuned, of_merged = (
        read_predictions(metrics / "predictions" / name) for name in ("base.csv", "tuned.csv", "merged.csv")
    )
    shas = {gguf: subject.gguf.sha256, **read_sums(quantized)}
    files = {
        name: file_choice(
            File(bytes=path.stat().st_size, sha256=shas[path]),
            str(path.relative_to(gguf.parent)),
            read_header(path),
            (of_tuned if path == gguf else read_predictions(metrics / "predictions" / "files" / f"{name}.csv"))["chat"],
            of_merged,
            params,
        )
        for name, path in by_type(gguf, quantized).items()
    }
    compared = compare(subject, of_base, of_tuned, of_merged, read_rows(facts, QuestionFacts), params)
    compared = compared.model_copy(update={"files": files})
    rows = of_base[compared.base_protocol.chosen], of_tuned["chat"]
    curves = make_curves(*rows, compared, params.bins)
    pictures = make_pictures(curves, *rows, metrics / "train_log.csv", compared)
    with writing(release) as partial:
        partial.mkdir()
        if compared.rehearsal:
            (partial / "README.md").write_text(f"{NO_RELEASE}\n", encoding="utf-8")
        else:
            splits, trained = read_as(Splits, metrics / "format.json"), read_as(Training, training)
            told = Facts(compared, splits, trained, origin, manifest, read_header(gguf), gguf.name, questions)
            write_release(partial, told, base)
            if questions:
                (partial / "imatrix.gguf").write_bytes(matrix.read_bytes())
            for name in pictures.keys() - {"loss"}:
                (partial / f"{name}.png").write_bytes(png(pictures[name]))
    write_svgs(pictures, metrics / "pictures")
    write_curves(curves, metrics / "curves")
    write_json(metrics / "compare.json", rounded(compared))
