"""Reference: the merged model at 16 bits and the test questions -> its predictions, to tell what quantization costs.

The same converter and scorer as the file that ships. Only the protocol `chat` is asked: it is the one that ships. Off
(`reference.enabled: false`), it writes a table without rows: a 16-bit Llama-3-8B takes 16 GB of disk and of memory.
"""

from pathlib import Path
from typing import Any

from pipeline.gguf import convert
from pipeline.measures import COLUMNS
from pipeline.predict import Params as Prediction
from pipeline.predict import predict
from pipeline.records import read_json, write_csv, write_json
from pipeline.stage import Usage, run, scratch
from pipeline.weights import MANIFEST, check_whole


class Params(Prediction):
    enabled: bool


def main(merged: Path, test: Path, predictions: Path, resources: Path) -> None:
    """Write PREDICTIONS of the model in MERGED, as evaluate does."""
    usage = Usage()
    params = Params.load("reference")
    rows: list[list[Any]] = []
    speed: dict[str, float] = {}
    if params.enabled:
        check_whole([merged / file["name"] for file in read_json(merged / MANIFEST)["files"]])
        with scratch(predictions.parent / "merged.gguf") as gguf:
            convert(merged, gguf, {})
            rows, speed = predict(gguf, test, params)
    write_csv(predictions, COLUMNS, rows)
    write_json(resources, {**usage.figures(), **speed})


if __name__ == "__main__":
    run(main)
