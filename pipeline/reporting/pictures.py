"""Pictures of a run, as Vega-Lite and drawn without a network: SVG for the repository, PNG for the model card."""

import csv
from pathlib import Path
from typing import Any

from pipeline.core.stage import writing
from pipeline.reporting.compare import NAMES, Bin, of_gold, results
from pipeline.scoring.measures import Prediction, confusion
from pipeline.scoring.protocols import LABELS

BLUE, GREY = "#1f5fa8", "#8a8f98"  # the tuned model, and whatever it is compared with
COLOURS = {"tuned": BLUE, "base": GREY}

VEGA_LITE = "5.21"

STYLE: dict[str, Any] = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "background": "white",
    "padding": 12,
    "config": {
        # vl-convert carries this font, and Arial has its widths: a picture is the same wherever it is drawn and seen.
        "font": "Liberation Sans, Arial, Helvetica, sans-serif",
        "axis": {"labelFontSize": 13, "titleFontSize": 13, "titleFontWeight": "normal", "labelLimit": 300},
        "title": {"fontSize": 16, "subtitleFontSize": 13, "subtitleColor": "#555", "anchor": "start", "offset": 12},
        "legend": {"labelFontSize": 12, "titleFontSize": 12},
        "header": {"labelFontSize": 14, "titleFontSize": 13},
        "view": {"stroke": None},
    },
}


def titled(text: str, subtitle: str, note: str) -> dict[str, Any]:
    """What every picture begins with; `note` says what its data are."""
    return {**STYLE, "title": {"text": text, "subtitle": [subtitle, note]}}


def accuracy_picture(figures: dict[str, float], note: str) -> dict[str, Any]:
    """Accuracy with its interval: tuned, base, TF-IDF, majority."""
    values = [
        {"name": name, "accuracy": share, "low": low, "high": high, "text": f"{share:.1%}"}
        for name, share, low, high, _ in results(figures)
    ]
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"ticks": False, "domain": False}}
    ink = {"condition": {"test": "datum.name == 'tuned model'", "value": BLUE}, "value": GREY}
    return {
        **titled(
            "Accuracy on the test questions",
            f"{figures['questions']:.0f} questions, {figures['confidence']:.0%} Wilson intervals",
            note,
        ),
        "width": 460,
        "height": {"step": 40},
        "data": {"values": values},
        "encoding": {"y": y, "color": ink},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 3},
                "encoding": {"x": share("low", "accuracy"), "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
                "encoding": {"x": share("accuracy", "accuracy")},
            },
            {
                "mark": {"type": "text", "dy": -14, "fontSize": 13},
                "encoding": {"x": share("accuracy", "accuracy"), "text": {"field": "text"}},
            },
        ],
    }


def confusion_picture(base: list[Prediction], tuned: list[Prediction], note: str) -> dict[str, Any]:
    """Gold against predicted label, base beside tuned: each line's shares, with the counts."""
    values = [
        {"model": name, "gold": gold, "predicted": label, "share": part, "text": f"{part:.0%} ({count})"}
        for name, rows in {NAMES["base"]: base, NAMES["tuned"]: tuned}.items()
        for gold, line in zip(LABELS, confusion(rows).tolist(), strict=True)
        for label, count in zip(LABELS, line, strict=True)
        for part in [count / max(sum(line), 1)]
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
        **titled("What each model answers", "shares of the questions with a gold label, and how many they are", note),
        "data": {"values": values},
        "facet": {"column": {"field": "model", "sort": [NAMES["base"], NAMES["tuned"]], "title": None}},
        "spec": {
            "width": 255,
            "height": 210,
            "encoding": cell,
            "layer": [
                {"mark": {"type": "rect", "stroke": "white"}, "encoding": {"color": shade}},
                {
                    "mark": {"type": "text", "fontSize": 14},
                    "encoding": {"text": {"field": "text"}, "color": ink},
                },
            ],
        },
    }


def loss_picture(log: Path, note: str) -> dict[str, Any]:
    """Training loss by step."""
    with log.open(encoding="utf-8", newline="") as file:
        values = [{"step": int(row["step"]), "loss": float(row["loss"])} for row in csv.DictReader(file)]
    return {
        **titled("Training loss", "mean over the tokens of the answers of a batch", note),
        "width": 460,
        "height": 240,
        "data": {"values": values},
        "mark": {"type": "line", "point": True, "color": BLUE},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "axis": {"tickMinStep": 1}},
            "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False}, "title": "loss (nats a token)"},
        },
    }


def colours(models: list[str]) -> dict[str, Any]:
    """One colour a model, the tuned one's the strongest."""
    scale = {"domain": [NAMES[model] for model in models], "range": [COLOURS[model] for model in models]}
    return {"field": "model", "type": "nominal", "scale": scale, "legend": {"title": None, "orient": "top"}}


def share(field: str, title: str) -> dict[str, Any]:
    """An axis from 0 to 100 %."""
    scale = {"domain": [0, 1]}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": {"format": ".0%"}, "title": title}


def diagonal(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    """A layer with a dashed line on which both axes agree."""
    return {
        "data": {"values": [{"share": 0}, {"share": 1}]},
        "mark": {"type": "line", "strokeDash": [5, 4], "color": "#999"},
        "encoding": {"x": share("share", x["title"]), "y": share("share", y["title"])},
    }


def reliability_picture(bins: dict[str, list[Bin]], note: str) -> dict[str, Any]:
    """How sure against how often right, a point a bin, its size the number of questions."""
    values = [{"model": NAMES[model], **b._asdict()} for model, found in bins.items() for b in found]
    x, y = share("confidence", "probability of the decision (mean of a bin)"), share("accuracy", "right")
    size = {"field": "questions", "type": "quantitative", "scale": {"range": [20, 500]}, "legend": None}
    colour = colours(list(bins))
    return {
        **titled(
            "Is it right as often as it is sure?",
            "on the dashed line: perfectly calibrated; larger points hold more questions",
            note,
        ),
        "width": 420,
        "height": 320,
        "layer": [
            diagonal(x, y),
            {"data": {"values": values}, "mark": "line", "encoding": {"x": x, "y": y, "color": colour}},
            {
                "data": {"values": values},
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": colour, "size": size},
            },
        ],
    }


def risk_coverage_picture(curves: dict[str, list[tuple[float, float]]], note: str) -> dict[str, Any]:
    """What share is wrong when only the surest questions are answered."""
    values = [
        {"model": NAMES[model], "coverage": coverage, "risk": risk}
        for model, curve in curves.items()
        for coverage, risk in curve
    ]
    y = {"field": "risk", "type": "quantitative", "axis": {"format": ".0%"}, "title": "of these, wrong"}
    return {
        **titled("What abstaining buys", "the surest questions are answered, the rest left to a person", note),
        "width": 460,
        "height": 280,
        "data": {"values": values},
        "mark": {"type": "line", "interpolate": "step-after"},
        "encoding": {
            "x": share("coverage", "questions answered"),
            "y": y,
            "color": colours(list(curves)),
        },
    }


def right_label_picture(base: list[Prediction], tuned: list[Prediction], note: str) -> dict[str, Any]:
    """The probability of each question's right label, base's against tuned's: above the line, tuning helped."""
    values = [
        {"label": row.label, "base": float(first), "tuned": float(second)}
        for row, first, second in zip(tuned, of_gold(base), of_gold(tuned), strict=True)
    ]
    colour = {
        "field": "label",
        "type": "nominal",
        "scale": {"domain": list(LABELS), "range": [BLUE, "#d1603d", "#6a4c93"]},
        "legend": {"title": "gold label", "orient": "top"},
    }
    x, y = share("base", f"probability by the {NAMES['base']}"), share("tuned", f"by the {NAMES['tuned']}")
    return {
        **titled(
            "Probability of the right label",
            "a point a question: above the dashed line the tuned model gives it more",
            note,
        ),
        "width": 380,
        "height": 380,
        "layer": [
            diagonal(x, y),
            {
                "data": {"values": values},
                "mark": {"type": "point", "filled": True, "opacity": 0.45, "size": 30},
                "encoding": {"x": x, "y": y, "color": colour},
            },
        ],
    }


def draw(pictures: dict[str, dict[str, Any]], directory: Path) -> None:
    """Write each Vega-Lite picture as an SVG into a new `directory`; needs no network."""
    import vl_convert

    with writing(directory) as partial:
        partial.mkdir()
        for name, picture in pictures.items():
            svg = vl_convert.vegalite_to_svg(picture, vl_version=VEGA_LITE)
            (partial / f"{name}.svg").write_text(svg, encoding="utf-8")


def png(picture: dict[str, Any]) -> bytes:
    """The picture as a PNG of 1.25 times its size in pixels, for pages that show no SVG."""
    import vl_convert

    return vl_convert.vegalite_to_png(picture, vl_version=VEGA_LITE, scale=1.25)
