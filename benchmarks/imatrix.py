"""Measure what the importance matrix buys, and what the cache's type changes, on the run in this directory.

    python -m benchmarks.imatrix --questions 500        after `dvc repro`
    python -m benchmarks.imatrix --tool llama-imatrix   the matrix against llama.cpp's own tool

KL is against the merged model at 16 bits, over yes, no and maybe renormalised, in nats. llama.cpp quantizes to IQ3_XS
only with a matrix, so `imatrix.kl_ratio` is that of IQ3_M, the smallest type that it quantizes to without one. The tool
(target llama-imatrix of the source package's vendor/llama.cpp) gets training texts; both get its chunks of 512 tokens.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.machine import LOGS
from benchmarks.record import Figures, record
from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.core.question import Question
from pipeline.core.rows import write_rows
from pipeline.models import imatrix
from pipeline.models.gguf import convert, quantize
from pipeline.models.manifest import read_manifest
from pipeline.models.vocabulary import Vocabulary
from pipeline.reporting.compare import log_shares
from pipeline.scoring.predict import Settings, predicted
from pipeline.scoring.predictions import Prediction

MERGED, DATA = Path("models/merged"), Path("data/formatted")
TYPES = ("Q3_K_M", "IQ3_M", "IQ3_XS")
CHUNK = 512  # tokens
MATRIX_QUESTIONS = 100


def asked(gguf: Path, test: Path, cache_type: str = "f16") -> list[Prediction]:
    """The predictions of a file under the protocol chat."""
    with predicted(gguf, test, Settings("evaluate", ["chat"], 2048, 8, cache_type)) as (rows, _):
        return rows


def differences(name: str, wide: list[Prediction], rows: list[Prediction]) -> Figures:
    """KL, accuracy and changed decisions against the predictions `wide`."""
    p, q = log_shares(wide), log_shares(rows)
    return {
        f"{name}.kl": (float(f"{(np.exp(p) * (p - q)).sum(axis=1).mean():.3g}"), "nats"),
        f"{name}.accuracy": (sum(row.prediction == row.label for row in rows) / len(rows), ""),
        f"{name}.changed": (
            sum(a.prediction != b.prediction for a, b in zip(wide, rows, strict=True)),
            f"of {len(rows)}",
        ),
    }


def worth(wide: Path, directory: Path, questions: int) -> Figures:
    """What matrix and cache type change."""
    test = directory / "test.jsonl"
    write_rows(test, read_rows(DATA / "test.jsonl", Question)[:questions])
    examples = read_rows(DATA / "train.jsonl", Example)[:MATRIX_QUESTIONS]
    matrix = imatrix.collect(wide, [row.input_ids for row in examples])
    reference = asked(wide, test)
    figures = differences("cache.q8_0.16_bits", reference, asked(wide, test, "q8_0"))
    for quant_type in TYPES:
        for name, entries in (("with", matrix), ("without", {})):
            if entries or quant_type != "IQ3_XS":
                target = directory / "quantized.gguf"
                quantize(wide, target, quant_type, entries)
                figures |= differences(f"imatrix.{quant_type}.{name}", reference, asked(target, test))
    ratio = figures["imatrix.IQ3_M.with.kl"][0] / figures["imatrix.IQ3_M.without.kl"][0]
    return figures | {"imatrix.kl_ratio": (round(ratio, 3), "with over without, IQ3_M")}


def agreement(wide: Path, directory: Path, tool: str) -> Figures:
    """The largest relative difference of a mean square from the tool's."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MERGED / "tokenizer.json"))
    rows = read_rows(DATA / "train.jsonl", Example)[:40]
    text = "\n".join(tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows)
    (directory / "text").write_text(text, encoding="utf-8")
    options = ["-c", f"{CHUNK}", "-b", f"{CHUNK}", "-ub", f"{CHUNK}", "--no-ppl", "-fa", "off", "-t", "1", "-ngl", "0"]
    command = [tool, "-m", str(wide), "-f", str(directory / "text"), "-o", str(directory / "theirs.gguf"), *options]
    subprocess.run(command, check=True, capture_output=True)
    theirs = imatrix.read(directory / "theirs.gguf")
    with Vocabulary(wide, "", vocab_only=True) as vocabulary:
        bos = vocabulary.lib.llama_vocab_bos(vocabulary.vocab)
        tokens = [bos, *vocabulary.tokenize(text)]
    chunks = [[bos, *tokens[start + 1 : start + CHUNK]] for start in range(0, len(tokens) - CHUNK + 1, CHUNK)]
    ours = imatrix.collect(wide, chunks)
    assert ours.keys() == theirs.keys()
    assert {entry.tokens for entry in ours.values()} == {entry.tokens for entry in theirs.values()}
    largest = max(float(np.abs(ours[name].importance / theirs[name].importance - 1).max()) for name in ours)
    return {
        "imatrix.tool.largest_relative_difference": (float(f"{largest:.2g}"), ""),
        "imatrix.tool.entries": (len(ours), ""),
        "imatrix.tool.chunks": (len(chunks), f"of {CHUNK} tokens"),
    }


def main() -> None:
    """Measure, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--tool", help="path of llama-imatrix")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        wide = directory / "wide.gguf"
        convert(MERGED, read_manifest(MERGED), wide, {})
        if given.tool:
            record(
                agreement(wide, directory, given.tool),
                "python -m benchmarks.imatrix --tool llama-imatrix",
                LOGS / "imatrix_tool.log",
            )
        else:
            figures = worth(wide, directory, given.questions)
            record(figures, f"python -m benchmarks.imatrix --questions {given.questions}", LOGS / "imatrix.log")


if __name__ == "__main__":
    main()
