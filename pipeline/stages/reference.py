"""Reference: the merged model at 16 bits and the test questions -> its predictions, to tell what quantization costs.

The same converter and scorer as the file that ships. Only the protocol `chat` is asked: it is the one that ships. Off
(`reference.enabled: false`), it writes a table without rows: a 16-bit Llama-3-8B takes 16 GB of disk and of memory.
"""

from pathlib import Path

from pipeline.core.records import write_csv, write_json
from pipeline.core.stage import Usage, run, scratch
from pipeline.models.gguf import convert
from pipeline.models.weights import check_whole, read_manifest
from pipeline.scoring.measures import COLUMNS
from pipeline.scoring.predict import Params as Prediction
from pipeline.scoring.predict import predict


class Params(Prediction):
    enabled: bool


def main(merged: Path, test: Path, predictions: Path, resources: Path) -> None:
    """Write PREDICTIONS of the model in MERGED, as evaluate does."""
    usage = Usage()
    params = Params.load("reference")
    speed: dict[str, float] = {}
    with scratch(predictions.parent / "merged.gguf") as gguf:  # whether or not it is wanted: a killed run left 16 GB
        if params.enabled:
            check_whole([merged / file["name"] for file in read_manifest(merged)["files"]])
            convert(merged, gguf, {})
            speed = predict(gguf, test, params, predictions)
        else:
            write_csv(predictions, COLUMNS, [])
    write_json(resources, {**usage.figures(), **speed})


if __name__ == "__main__":
    run(main)
