"""Report: the predictions of base and tuned model -> their comparison, pictures, and what is released beside the GGUF.

The questions are a sample, and both models answer the same ones, so the comparison is paired (Miller 2024, 'Adding
Error Bars to Evals', https://arxiv.org/abs/2411.00640). Every figure in the model card comes from what is read here.
"""

import csv
import io
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from ruamel.yaml import YAML

from pipeline.measures import Prediction, accuracy, cells, confusion, macro_f1, read_predictions, score, wilson
from pipeline.prompt import LABELS
from pipeline.records import read_json, read_jsonl, sha256, write_json
from pipeline.stage import Fail, Section, run, writing

NAMES = {
    "tuned": "tuned model",
    "base": "untuned base",
    "tfidf": "TF-IDF + logistic regression",
    "majority": "majority label",
}
TEXT_BASELINES = ("tfidf", "majority")
MEASURES = ("accuracy", "macro_f1")
LLAMA_3 = "Llama-3"  # in the name of a repository whose weights are under the Meta Llama 3 Community License


class Params(Section):
    bootstrap_samples: Annotated[int, Field(ge=1000, le=1_000_000)]
    seed: int
    confidence: Annotated[float, Field(gt=0.5, lt=1)]


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test (1947): are the questions that one model alone gets right split evenly?"""
    from scipy.stats import binomtest  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    changed = only_first + only_second
    return float(binomtest(only_first, changed).pvalue) if changed else 1.0


def paired_bootstrap(
    base: list[Prediction], tuned: list[Prediction], samples: int, seed: int, confidence: float
) -> dict[str, tuple[float, float]]:
    """Percentile intervals (Efron 1979) of tuned minus base, in accuracy and macro-F1, on the same questions.

    A question is drawn with both its predictions. Drawing questions with replacement is drawing the counts of the 27
    combinations of gold, base's and tuned's label from a multinomial distribution.
    """
    counts = cells([row.label for row in base], [row.prediction for row in base], [row.prediction for row in tuned])
    draws = np.random.default_rng(seed).multinomial(len(base), counts.ravel() / len(base), size=samples)
    drawn = draws.reshape(samples, *counts.shape)
    of_base, of_tuned = drawn.sum(axis=3), drawn.sum(axis=2)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals: dict[str, tuple[float, float]] = {}
    for name, measure in {"accuracy": accuracy, "macro_f1": macro_f1}.items():
        low, high = np.quantile(measure(of_tuned) - measure(of_base), tails)
        intervals[name] = (float(low), float(high))
    return intervals


def check_same_questions(base: list[Prediction], tuned: list[Prediction]) -> None:
    """Raise `Fail` unless both tables, sorted by PMID, hold the same questions with the same gold labels."""
    if apart := {row.pmid for row in base} ^ {row.pmid for row in tuned}:
        raise Fail(f"base and tuned answered different questions: PMID {min(apart)} is in one table only")
    for one, other in zip(base, tuned, strict=True):
        if one.label != other.label:
            raise Fail(f"base and tuned were scored against different labels: PMID {one.pmid}")


def compare(base: list[Prediction], tuned: list[Prediction], params: Params) -> dict[str, float]:
    """Both models' scores and tuned minus base, flat and numeric; both tables sorted by PMID."""
    check_same_questions(base, tuned)
    figures: dict[str, float] = {"questions": len(base), "confidence": params.confidence}
    for model, rows in {"base": base, "tuned": tuned}.items():
        scores = score(rows, params.confidence)
        for name in ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "recall_maybe", "unparsable_rate"):
            figures[f"{model}_{name}"] = scores[name]
    intervals = paired_bootstrap(base, tuned, params.bootstrap_samples, params.seed, params.confidence)
    for name, (low, high) in intervals.items():
        figures[f"{name}_difference"] = round(figures[f"tuned_{name}"] - figures[f"base_{name}"], 6)
        figures |= {f"{name}_difference_low": round(low, 6), f"{name}_difference_high": round(high, 6)}
    right = [(a.prediction == a.label, b.prediction == b.label) for a, b in zip(base, tuned, strict=True)]
    base_only, tuned_only = right.count((True, False)), right.count((False, True))
    p = mcnemar(base_only, tuned_only)
    return {**figures, "base_only_right": base_only, "tuned_only_right": tuned_only, "mcnemar_p": float(f"{p:.6g}")}


def verdict(figures: dict[str, float]) -> str:
    """The difference in accuracy in one sentence, and whether it can be told from noise."""
    low, high = (100 * figures[f"accuracy_difference_{side}"] for side in ("low", "high"))
    difference, p = 100 * figures["accuracy_difference"], figures["mcnemar_p"]
    if low <= 0 <= high:
        told = "no more than noise on this many questions"
    else:
        told = f"more than noise, the tuned model is {'better' if low > 0 else 'worse'}"
    return (
        f"Tuned minus base: {difference:+.1f} points of accuracy ({figures['confidence']:.0%} interval {low:+.1f} to "
        f"{high:+.1f}; McNemar's exact p {p:.2g}): {told}."
    )


def results(figures: dict[str, float]) -> list[tuple[str, float, float, float, float]]:
    """Name, accuracy, its interval's ends and macro-F1 of each model and baseline, the tuned model first."""
    rows: list[tuple[str, float, float, float, float]] = []
    for key, name in NAMES.items():
        share, questions = figures[f"{key}_accuracy"], int(figures["questions"])
        low, high = wilson(round(share * questions), questions, figures["confidence"])
        rows.append((name, share, low, high, figures[f"{key}_macro_f1"]))
    return rows


# Pictures

STYLE: dict[str, Any] = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "background": "white",
    "padding": 12,
    "config": {
        # vl-convert carries this font, and Arial has its widths: a picture is the same wherever it is drawn and seen.
        "font": "Liberation Sans, Arial, Helvetica, sans-serif",
        "axis": {"labelFontSize": 13, "titleFontSize": 13, "titleFontWeight": "normal", "labelLimit": 300},
        "title": {"fontSize": 16, "subtitleFontSize": 13, "subtitleColor": "#555", "anchor": "start", "offset": 12},
        "header": {"labelFontSize": 14, "titleFontSize": 13},
        "view": {"stroke": None},
    },
}


def accuracy_picture(figures: dict[str, float], note: str) -> dict[str, Any]:
    """Accuracy with its interval: tuned, base, TF-IDF, majority."""
    values = [
        {"name": name, "accuracy": share, "low": low, "high": high, "text": f"{share:.1%}"}
        for name, share, low, high, _ in results(figures)
    ]
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"ticks": False, "domain": False}}
    x = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"format": ".0%"}, "title": "accuracy"}
    shade = {"condition": {"test": "datum.name == 'tuned model'", "value": "#1f5fa8"}, "value": "#8a8f98"}
    return {
        **STYLE,
        "title": {
            "text": "Accuracy on the test questions",
            "subtitle": [f"{figures['questions']:.0f} questions, {figures['confidence']:.0%} Wilson intervals", note],
        },
        "width": 460,
        "height": {"step": 40},
        "data": {"values": values},
        "encoding": {"y": y, "color": shade},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 3},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
                "encoding": {"x": {**x, "field": "accuracy"}},
            },
            {
                "mark": {"type": "text", "dy": -14, "fontSize": 13},
                "encoding": {"x": {**x, "field": "accuracy"}, "text": {"field": "text"}},
            },
        ],
    }


def confusion_picture(base: list[Prediction], tuned: list[Prediction], note: str) -> dict[str, Any]:
    """Gold against predicted label, base beside tuned: counts, shaded by their share of the gold label."""
    values = [
        {"model": name, "gold": gold, "predicted": label, "questions": count, "share": count / max(sum(line), 1)}
        for name, rows in {NAMES["base"]: base, NAMES["tuned"]: tuned}.items()
        for gold, line in zip(LABELS, confusion(rows).tolist(), strict=True)
        for label, count in zip(LABELS, line, strict=True)
    ]
    axis = {"type": "nominal", "sort": list(LABELS), "axis": {"labelAngle": 0, "ticks": False, "domain": False}}
    cell = {"x": {"field": "predicted", **axis}, "y": {"field": "gold", **axis, "title": "gold label"}}
    ink = {"condition": {"test": "datum.share > 0.55", "value": "white"}, "value": "#222"}
    shade = {
        "field": "share",
        "type": "quantitative",
        "scale": {"scheme": "blues", "domain": [0, 1]},
        "legend": None,
    }
    return {
        **STYLE,
        "title": {
            "text": "What each model answers",
            "subtitle": ["questions, shaded by their share of the gold label", note],
        },
        "data": {"values": values},
        "facet": {"column": {"field": "model", "sort": [NAMES["base"], NAMES["tuned"]], "title": None}},
        "spec": {
            "width": 210,
            "height": 210,
            "encoding": cell,
            "layer": [
                {"mark": {"type": "rect", "stroke": "white"}, "encoding": {"color": shade}},
                {
                    "mark": {"type": "text", "fontSize": 16},
                    "encoding": {"text": {"field": "questions"}, "color": ink},
                },
            ],
        },
    }


def loss_picture(log: Path, note: str) -> dict[str, Any]:
    """Training loss by step."""
    with log.open(encoding="utf-8", newline="") as file:
        values = [{"step": int(row["step"]), "loss": float(row["loss"])} for row in csv.DictReader(file)]
    return {
        **STYLE,
        "title": {"text": "Training loss", "subtitle": ["mean over the tokens of the answers of a batch", note]},
        "width": 460,
        "height": 240,
        "data": {"values": values},
        "mark": {"type": "line", "point": True, "color": "#1f5fa8"},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "axis": {"tickMinStep": 1}},
            "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False}, "title": "loss (nats a token)"},
        },
    }


def draw(pictures: dict[str, dict[str, Any]], directory: Path) -> None:
    """Write each Vega-Lite picture as an SVG into a new `directory`; needs no network."""
    import vl_convert

    with writing(directory) as partial:
        partial.mkdir()
        for name, picture in pictures.items():
            svg = vl_convert.vegalite_to_svg(picture, vl_version="5.21")
            (partial / f"{name}.svg").write_text(svg, encoding="utf-8")


# What is released

REHEARSAL = "rehearsal/"  # what the name of a base of random weights begins with (benchmarks/rehearsal.py)
NO_RELEASE = "A rehearsal with random weights: these numbers mean nothing, and nothing is released."
SIMULATED = "The data are simulated: these numbers are not medical accuracy."


def is_llama_3(manifest: dict[str, Any]) -> bool:
    """Whether the base is under the Meta Llama 3 Community License."""
    return LLAMA_3 in manifest.get("repo_id", "")


def front_matter(figures: dict[str, float], source: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The model card's metadata as YAML (https://github.com/huggingface/hub-docs, modelcard.md), results included."""
    licence = "mit" if manifest["source"] == "tiny" else "llama3" if is_llama_3(manifest) else "other"
    result = {
        "task": {"type": "question-answering", "name": "yes, no or maybe from an abstract"},
        "dataset": {"type": source.get("dataset", "other"), "name": source["name"], "split": "test"},
        "metrics": [
            {"type": "accuracy", "name": "accuracy", "value": figures["tuned_accuracy"]},
            {"type": "f1", "name": "macro-F1", "value": figures["tuned_macro_f1"]},
        ],
    }
    metadata = {
        "language": "en",
        "license": licence,
        **({"base_model": manifest["repo_id"]} if "repo_id" in manifest else {}),
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "medical", *(["simulated-data"] if source["simulated"] else [])],
        "model-index": [{"name": "medical-reasoner", "results": [result]}],
    }
    text = io.StringIO()
    YAML().dump(metadata, text)  # pyright: ignore[reportUnknownMemberType]
    return text.getvalue()


def results_table(figures: dict[str, float]) -> str:
    """The rows of results as Markdown."""
    lines = [
        f"| {name} | {share:.1%} | {low:.1%} to {high:.1%} | {f1:.1%} |"
        for name, share, low, high, f1 in results(figures)
    ]
    return "\n".join(["| | accuracy | interval | macro-F1 |", "| --- | --- | --- | --- |", *lines])


def licence_of_base(manifest: dict[str, Any]) -> str:
    """Whose terms the weights are under, in a sentence or two."""
    if manifest["source"] == "tiny":
        return "MIT: its weights are made by this project."
    if is_llama_3(manifest):
        return "Meta Llama 3 Community License. Built with Meta Llama 3."
    return "its own; this model is derived from it and may be passed on only under its terms."


def card(figures: dict[str, float], source: dict[str, Any], manifest: dict[str, Any], name: str, digest: str) -> str:
    """The model card, for the GGUF called `name` with the sha256 `digest`."""
    match manifest["source"]:
        case "tiny":
            base = "a tiny Llama that this project trains from scratch to try the pipeline with"
        case "hub":
            base = f"[{manifest['repo_id']}](https://huggingface.co/{manifest['repo_id']}) at {manifest['revision']}"
        case _:
            base = "a model of your own"
    notice = f"\n{SIMULATED}\n" if source["simulated"] else ""
    return f"""---
{front_matter(figures, source, manifest)}---
# medical-reasoner

**Not for clinical use.**
{notice}
One file for llama.cpp, LM Studio or Ollama that answers a research question about an abstract with yes, no or maybe,
then a conclusion. It runs offline.

- Base: {base}
- Training data: {source["name"]}
- Training: QLoRA, then merged and quantized by llama.cpp

## Intended use

Research and teaching: how a small model is fine-tuned and measured. Paste the abstract before the question.
It is no medical device and was not tested in practice; it can be wrong and sound certain. Do not let it inform
the diagnosis or treatment of anyone.

## Results

On {figures["questions"]:.0f} test questions, none of them trained on. The answer is the likeliest of yes, no and maybe,
by log-probability; intervals are Wilson's, {figures["confidence"]:.0%}.
{notice}
{results_table(figures)}

{verdict(figures)}
Of the questions whose answer is 'maybe', the tuned model finds {figures["tuned_recall_maybe"]:.1%}, the base
{figures["base_recall_maybe"]:.1%}. Left to write freely, the tuned model gives no decision on
{figures["tuned_unparsable_rate"]:.1%} of the questions, the base on {figures["base_unparsable_rate"]:.1%}.

![Accuracy of the tuned model and of what it must beat](accuracy.svg)

![Predicted labels against gold labels](confusion.svg)

## File

`{name}`: {figures["gguf_bytes"]:,.0f} bytes, sha256 `{digest}`

## Licences

- Base: {licence_of_base(manifest)}
- Data: {source["licence"]}
"""


def modelfile(gguf: str, system_prompt: str) -> str:
    """An Ollama Modelfile (https://github.com/ollama/ollama, docs/modelfile.md); the chat template is in the GGUF."""
    return f'FROM {gguf}\nPARAMETER temperature 0\nSYSTEM """{system_prompt}"""\n'


def main(
    base: Path,
    tuned: Path,
    baseline: Path,
    train_log: Path,
    test: Path,
    source: Path,
    manifest: Path,
    gguf: Path,
    comparison: Path,
    pictures: Path,
    release: Path,
) -> None:
    """Write COMPARISON (flat JSON), PICTURES (SVG files) and RELEASE (model card, its pictures, Ollama Modelfile).

    BASE and TUNED are tables of predictions, BASELINE holds the text baselines' scores, TEST's prompts the system
    prompt; SOURCE and MANIFEST say where data and base come from.
    """
    params = Params.load("report")
    base_model = read_json(manifest)
    rehearsal = base_model.get("repo_id", "").startswith(REHEARSAL)
    base_rows, tuned_rows = sorted(read_predictions(base)), sorted(read_predictions(tuned))
    text_baselines = read_json(baseline)
    origin = read_json(source)
    figures = compare(base_rows, tuned_rows, params)
    figures |= {f"{name}_{score}": text_baselines[f"{name}_{score}"] for name in TEXT_BASELINES for score in MEASURES}
    figures |= {"gguf_bytes": gguf.stat().st_size, "simulated": origin["simulated"], "rehearsal": rehearsal}
    note = SIMULATED if origin["simulated"] else origin["name"]
    if rehearsal:
        note = NO_RELEASE
    drawn = {
        "accuracy": accuracy_picture(figures, note),
        "confusion": confusion_picture(base_rows, tuned_rows, note),
        "loss": loss_picture(train_log, note),
    }
    draw(drawn, pictures)
    with writing(release) as partial:
        partial.mkdir()
        if rehearsal:
            (partial / "README.md").write_text(f"{NO_RELEASE}\n", encoding="utf-8")
            write_json(comparison, figures)
            return
        text = card(figures, origin, base_model, gguf.name, sha256(gguf))
        (partial / "README.md").write_text(text, encoding="utf-8")
        system_prompt = read_jsonl(test)[0]["prompt"][0]["content"]
        path = f"../{gguf.name}"
        (partial / "Modelfile").write_text(modelfile(path, system_prompt), encoding="utf-8")
        for name in ("accuracy.svg", "confusion.svg"):
            shutil.copyfile(pictures / name, partial / name)
    write_json(comparison, figures)


if __name__ == "__main__":
    run(main)
