"""Quantize: models/merged -> models/medical-reasoner.gguf, the file that ships, and its importance matrix.

llama.cpp's converter writes a temporary 16-bit GGUF, which evaluates training questions for the importance matrix; its
quantizer turns that file into, for example, Q4_K_M.
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
from pipeline.sections.quantize import Quantize


def main(
    merged: Path, train: Path, source: Path, system_prompt: Path, gguf: Path, matrix: Path, resources: Path
) -> None:
    """Write GGUF and MATRIX, over questions of TRAIN.

    SOURCE says where the data come from, SYSTEM_PROMPT holds the prompt of the training.
    """
    usage = Usage()
    params = load_params("quantize", Quantize)
    manifest = read_manifest(merged)
    check_whole([merged / file.name for file in manifest.files])
    about = metadata(manifest, read_as(Source, source), params.quant_type, read_text(system_prompt))
    texts = params.texts(read_rows(train, Example))
    with writing(gguf) as partial, writing(matrix) as partial_matrix:
        found = build(merged, manifest, {partial: params.quant_type}, about, texts)
        imatrix.write(partial_matrix, found, len(texts))
        if fallbacks := read_header(partial).fallbacks:
            used = ", ".join(f"{count} matrices are {name}" for name, count in fallbacks.items())
            sys.stderr.write(f"{params.quant_type} needs rows of a multiple of 256, so llama.cpp used others: {used}\n")
    write_json(resources, usage.figures())
