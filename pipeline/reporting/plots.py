"""The curves of a run, and its pictures.

Each plot has one definition: a Vega-Lite template in .dvc/plots, which DVC fills for its page and `fill` for pictures.
"""

import csv
import json
import zlib
from pathlib import Path
from typing import Any

from pipeline.core.files import read_text
from pipeline.core.outputs import write_csv, writing
from pipeline.reporting.compare import probability_of_gold, reliability, risk_coverage
from pipeline.reporting.comparison import BASE, TUNED, Comparison, note, results
from pipeline.scoring.measures import rounded
from pipeline.scoring.predictions import Prediction

TEMPLATES = Path(".dvc/plots")
VEGA_LITE = "5.21"
COLOUR = {"value": "#1f5fa8"}  # DVC has a colour for each revision; a picture shows one run
STYLE = Path(__file__).parent / "templates" / "release" / "style.json"  # of the pictures
Rows = list[dict[str, Any]]


def make_curves(base: list[Prediction], tuned: list[Prediction], comparison: Comparison, bins: int) -> dict[str, Rows]:
    """Template -> rows of the table that it draws."""
    models = {TUNED: tuned, BASE: base}
    gold = zip(tuned, probability_of_gold(base).tolist(), probability_of_gold(tuned).tolist(), strict=True)
    return {
        "accuracy": [
            {"model": name, "accuracy": row.accuracy.value, "low": row.accuracy.low, "high": row.accuracy.high}
            for name, row in results(comparison).items()
        ],
        "reliability": [
            {"model": name, **b._asdict()} for name, rows in models.items() for b in reliability(rows, bins)
        ],
        "risk_coverage": [
            {"model": name, "coverage": coverage, "risk": risk}
            for name, rows in models.items()
            for coverage, risk in risk_coverage(rows)
        ],
        "right_label": [{"pmid": row.pmid, "label": row.label, "base": b, "tuned": t} for row, b, t in gold],
    }


def write_curves(curves: dict[str, Rows], directory: Path) -> None:
    """Write each table as a CSV file."""
    for name, rows in curves.items():
        write_csv(directory / f"{name}.csv", rows[0], (rounded(row).values() for row in rows))


def fill(template: str, rows: Rows, title: str) -> dict[str, Any]:
    """The template as Vega-Lite, filled as DVC fills it; rows without `rev` are of one nameless revision."""
    text = read_text(TEMPLATES / f"{template}.json").replace("<DVC_METRIC_TITLE>", json.dumps(title)[1:-1])
    for anchor, value in {"DATA": [{"rev": "", **row} for row in rows], "COLOR": COLOUR}.items():
        text = text.replace(f'"<DVC_METRIC_{anchor}>"', json.dumps(value))
    return {**json.loads(text), **json.loads(read_text(STYLE))}


def make_pictures(
    curves: dict[str, Rows], base: list[Prediction], tuned: list[Prediction], log: Path, comparison: Comparison
) -> dict[str, dict[str, Any]]:
    """Name -> Vega-Lite of each picture; `log` is the table of training steps."""
    models = {f"{BASE} ({comparison.base_protocol.chosen})": base, f"{TUNED} (chat)": tuned}
    confusion = [
        {"rev": name, "protocol": "chat", "label": row.label, "prediction": row.prediction}  # the template draws chat
        for name, rows in models.items()
        for row in rows
    ]
    about = note(comparison)
    with log.open(encoding="utf-8", newline="") as file:
        loss = fill("loss", list(csv.DictReader(file)), about)
    drawn = {name: fill(name, rows, about) for name, rows in curves.items()}
    drawn["confusion"] = fill("confusion", confusion, "base and tuned model")
    drawn["confusion"]["title"]["subtitle"].append(about)
    return {**drawn, "loss": loss}


def write_svgs(pictures: dict[str, dict[str, Any]], directory: Path) -> None:
    """Write each picture as SVG into a new `directory`; needs no network."""
    import vl_convert

    with writing(directory) as partial:
        partial.mkdir()
        for name, picture in pictures.items():
            svg = vl_convert.vegalite_to_svg(picture, vl_version=VEGA_LITE)
            (partial / f"{name}.svg").write_text(svg, encoding="utf-8")


def png(picture: dict[str, Any]) -> bytes:
    """The picture as PNG, for pages that show no SVG."""
    import vl_convert

    return smaller(vl_convert.vegalite_to_png(picture, vl_version=VEGA_LITE, scale=1.25))


def smaller(image: bytes) -> bytes:
    """The PNG with its pixels compressed again: vl-convert compresses for speed, to five times the size."""
    chunks: list[tuple[bytes, bytes]] = []
    at = 8  # after the signature
    while at < len(image):
        end = at + 8 + int.from_bytes(image[at : at + 4])
        chunks.append((image[at + 4 : at + 8], image[at + 8 : end]))
        at = end + 4  # after the checksum
    pixels = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    chunks = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    chunks.insert(-1, (b"IDAT", zlib.compress(pixels, 9)))
    sums = [(kind, data, zlib.crc32(kind + data)) for kind, data in chunks]
    return image[:8] + b"".join(len(data).to_bytes(4) + kind + data + crc.to_bytes(4) for kind, data, crc in sums)
