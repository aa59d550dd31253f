"""Evaluate: the GGUF files and the test questions -> a prediction for each, by protocol, and their scores.

P(label | prompt) by summed log-probability, as lm-evaluation-harness scores PubMedQA, computed by llama.cpp; under the
protocol `chat` a greedy answer is the second opinion. Measures are PubMedQA's own, accuracy and macro-F1 over all and
only the test PMIDs (https://github.com/pubmedqa/pubmedqa, evaluation.py).
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.core.outputs import write_json, writing
from pipeline.core.params import load_params
from pipeline.core.resume import installed
from pipeline.core.usage import Usage
from pipeline.models.gguf_header import read_header
from pipeline.models.quantized import by_type
from pipeline.scoring.measures import MUCH, summary
from pipeline.scoring.predict import EXTRAS, Settings, predicted
from pipeline.scoring.predictions import read_predictions, write_predictions
from pipeline.scoring.scorer import N_UBATCH
from pipeline.sections.evaluate import Evaluate


def about(gguf: Path) -> dict[str, Any]:
    """Size, the number of matrices of each quantization type, and the packages that scored it."""
    header = read_header(gguf)
    return {"bytes": gguf.stat().st_size, "types": header.types, "packages": installed(EXTRAS)}


def main(
    gguf: Path, quantized: Path, test: Path, predictions: Path, by_file: Path, metrics: Path, resources: Path
) -> None:
    """Write PREDICTIONS of GGUF (a row for each protocol and question; no text) and METRICS.

    The directory BY_FILE gets a table of the protocol `chat` for each file of QUANTIZED, named by its type;
    without such files, none.csv without rows.
    """
    usage = Usage()
    params = load_params("evaluate", Evaluate)
    settings = Settings("evaluate", params.protocols, params.n_ctx, params.max_new_tokens, params.cache_type)
    headline, *others = files = by_type(gguf, quantized)
    with ExitStack() as stack:  # a journal is kept until all tables are written
        found = {
            name: stack.enter_context(
                predicted(path, test, settings if name == headline else settings._replace(protocols=["chat"]))
            )
            for name, path in files.items()
        }
        write_predictions(predictions, found[headline][0])
        with writing(by_file) as directory:
            tables = {name: found[name][0] for name in others}
            for name, rows in (tables or {"none": []}).items():  # git keeps no empty directory
                write_predictions(directory / f"{name}.csv", rows)
    figures: dict[str, Any] = {
        **summary(read_predictions(predictions)),
        "n_ubatch": N_UBATCH,
        "cache_type": params.cache_type,
        "gguf": about(gguf),
        "files": {
            name: {**summary(read_predictions(by_file / f"{name}.csv")), "gguf": about(files[name])} for name in others
        },
    }
    if (outside := figures["chat"]["outside_labels"]) > MUCH:
        sys.stderr.write(
            f"warning: first words other than yes, no and maybe have {outside:.1%} of the probability: the model "
            "usually begins its answer with one of them\n"
        )
    write_json(metrics, figures)
    speed = {name: found[name][1] for name in files}
    write_json(resources, {**usage.figures(), **speed[headline], "files": speed})
