"""Evaluate: the GGUF that ships and the test questions -> a prediction for each, by protocol, and their scores.

P(label | prompt) by summed log-probability, as lm-evaluation-harness scores PubMedQA, computed by llama.cpp; under the
protocol `chat` a greedy answer is the second opinion. Measures are PubMedQA's own, accuracy and macro-F1 over all and
only the test PMIDs (https://github.com/pubmedqa/pubmedqa, evaluation.py).
"""

import sys
from pathlib import Path
from typing import Any

from pipeline.core.outputs import write_json
from pipeline.core.params import load_params
from pipeline.core.resume import installed
from pipeline.core.usage import Usage
from pipeline.models.gguf_header import read_header
from pipeline.scoring.measures import MUCH, summary
from pipeline.scoring.predict import EXTRAS, Settings, predict
from pipeline.scoring.predictions import read_predictions
from pipeline.scoring.scorer import N_UBATCH
from pipeline.sections.evaluate import Evaluate


def about(gguf: Path) -> dict[str, Any]:
    """Size, the number of matrices of each quantization type, and the packages that scored it."""
    header = read_header(gguf)
    return {"bytes": gguf.stat().st_size, "types": header.types, "packages": installed(EXTRAS)}


def warn(outside_labels: float) -> None:
    """Say so if the labels hold little probability: then accuracy says little about written answers."""
    if outside_labels > MUCH:
        sys.stderr.write(
            f"warning: first words other than yes, no and maybe have {outside_labels:.1%} of the probability: the "
            "model usually begins its answer with one of them\n"
        )


def main(gguf: Path, test: Path, predictions: Path, metrics: Path, resources: Path) -> None:
    """Write PREDICTIONS (a row for each protocol and question; no text) and METRICS."""
    usage = Usage()
    params = load_params("evaluate", Evaluate)
    settings = Settings("evaluate", params.protocols, params.n_ctx, params.max_new_tokens)
    speed = predict(gguf, test, settings, predictions)
    figures: dict[str, Any] = {**summary(read_predictions(predictions)), "n_ubatch": N_UBATCH, "gguf": about(gguf)}
    warn(figures["chat"]["outside_labels"])
    write_json(metrics, figures)
    write_json(resources, {**usage.figures(), **speed})
