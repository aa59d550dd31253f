"""Quantize: models/merged -> models/medical-reasoner.gguf, the same model in other types, and the importance matrix.

llama.cpp's converter writes a temporary 16-bit GGUF, which evaluates training questions for the importance matrix; its
quantizer turns that file into each type, for example Q4_K_M.
"""

import sys
from pathlib import Path

from pipeline.core.example import Example
from pipeline.core.files import read_as, read_rows, read_text
from pipeline.core.outputs import write_json, writing
from pipeline.core.params import load_params
from pipeline.core.source import Source
from pipeline.core.usage import Usage
from pipeline.models import imatrix
from pipeline.models.directory import check_whole
from pipeline.models.gguf import build
from pipeline.models.gguf_header import read_header
from pipeline.models.gguf_metadata import metadata
from pipeline.models.manifest import read_manifest
from pipeline.models.quantized import write_sums
from pipeline.sections.quantize import Quantize, texts


def main(
    merged: Path,
    train: Path,
    source: Path,
    system_prompt: Path,
    gguf: Path,
    quantized: Path,
    matrix: Path,
    resources: Path,
) -> None:
    """Write GGUF, of the first type, the directory QUANTIZED with the other types, and MATRIX over questions of TRAIN.

    SOURCE says where the data come from, SYSTEM_PROMPT holds the prompt of the training.
    """
    usage = Usage()
    params = load_params("quantize", Quantize)
    manifest = read_manifest(merged)
    check_whole([merged / file.name for file in manifest.files])
    about = metadata(manifest, read_as(Source, source), read_text(system_prompt))
    tokens = texts(params.imatrix_questions, read_rows(train, Example))
    headline, *others = params.quant_types
    with writing(gguf) as partial, writing(quantized) as directory, writing(matrix) as partial_matrix:
        directory.mkdir()
        paths = {directory / f"{gguf.stem}-{name}.gguf": name for name in others}
        found = build(merged, manifest, {partial: headline, **paths}, about, tokens)
        write_sums(directory, list(paths))
        imatrix.write(partial_matrix, found, len(tokens))
        for path, name in {partial: headline, **paths}.items():
            if fallbacks := read_header(path).fallbacks:
                used = ", ".join(f"{count} matrices are {kind}" for kind, count in fallbacks.items())
                sys.stderr.write(f"{name} needs rows of a multiple of 256, so llama.cpp used others: {used}\n")
    write_json(resources, usage.figures())
