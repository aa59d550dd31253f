"""Evaluate: the GGUF that ships and the test questions -> a prediction for each, by protocol, and their scores.

P(label | prompt) by summed log-probability, as lm-evaluation-harness scores PubMedQA, but from llama.cpp's kernels; in
the protocol `chat` a greedy answer is the second opinion. Measures are PubMedQA's own, accuracy and macro-F1 over all
and only the test PMIDs (https://github.com/pubmedqa/pubmedqa, evaluation.py).
"""

from pathlib import Path

from pipeline.core.records import write_json
from pipeline.core.stage import Usage, run
from pipeline.scoring.measures import summary
from pipeline.scoring.predict import Params, predict
from pipeline.scoring.scorer import N_UBATCH


def main(gguf: Path, test: Path, predictions: Path, metrics: Path, resources: Path) -> None:
    """Write PREDICTIONS (a row of measures.COLUMNS for each protocol and question; no text) and METRICS."""
    usage = Usage()
    speed = predict(gguf, test, Params.load("evaluate"), predictions)
    write_json(metrics, {**summary(predictions), "n_ubatch": N_UBATCH, "gguf_bytes": gguf.stat().st_size})
    write_json(resources, {**usage.figures(), **speed})


if __name__ == "__main__":
    run(main)
