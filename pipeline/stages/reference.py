"""Reference: the merged model at 16 bits and the test questions -> its predictions: the cost of quantization.

The same converter and scorer as for the file that ships; only the protocol `chat` is asked. Off (`reference.enabled:
false`), it writes a table without rows: a 16-bit Llama-3-8B takes 16 GB of disk and of memory.
"""

from pathlib import Path

from pipeline.core.outputs import scratch, write_json
from pipeline.core.params import load_params
from pipeline.core.usage import Usage
from pipeline.models.directory import check_whole
from pipeline.models.gguf import convert
from pipeline.models.manifest import read_manifest
from pipeline.scoring.predict import Settings, predict
from pipeline.scoring.predictions import write_predictions
from pipeline.sections.evaluate import Evaluate, Reference


def main(merged: Path, test: Path, predictions: Path, resources: Path) -> None:
    """Write PREDICTIONS of the model in MERGED, as evaluate does."""
    usage = Usage()
    params = load_params("reference", Reference)
    cache_type = load_params("evaluate", Evaluate).cache_type
    settings = Settings("reference", ["chat"], params.n_ctx, params.max_new_tokens, cache_type)
    speed: dict[str, float] = {}
    with scratch(predictions.parent / "merged.gguf") as gguf:  # removes what a killed run left, even if not enabled
        if params.enabled:
            manifest = read_manifest(merged)
            check_whole([merged / file.name for file in manifest.files])
            convert(merged, manifest, gguf, {})
            speed = predict(gguf, test, settings, predictions)
        else:
            write_predictions(predictions, [])
    write_json(resources, {**usage.figures(), **speed})
