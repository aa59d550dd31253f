"""Quantize: models/merged -> models/medical-reasoner.gguf, the file that ships.

llama.cpp's converter writes a temporary 16-bit GGUF, its quantizer turns that into, for example, Q4_K_M.
"""

import sys
from pathlib import Path

from pipeline.core.files import read_as, read_text
from pipeline.core.outputs import write_json, writing
from pipeline.core.params import load_params
from pipeline.core.source import Source
from pipeline.core.usage import Usage
from pipeline.models.directory import check_whole
from pipeline.models.gguf import build
from pipeline.models.gguf_header import read_header
from pipeline.models.gguf_metadata import metadata
from pipeline.models.manifest import read_manifest
from pipeline.sections.quantize import Quantize


def main(merged: Path, source: Path, system_prompt: Path, gguf: Path, resources: Path) -> None:
    """Write GGUF; SOURCE says where the data come from, SYSTEM_PROMPT holds the prompt of the training."""
    usage = Usage()
    params = load_params("quantize", Quantize)
    manifest = read_manifest(merged)
    check_whole([merged / file.name for file in manifest.files])
    about = metadata(manifest, read_as(Source, source), params.quant_type, read_text(system_prompt))
    with writing(gguf) as partial:
        build(merged, manifest, partial, params.quant_type, about)
        if fallbacks := read_header(partial).fallbacks:
            used = ", ".join(f"{count} matrices are {name}" for name, count in fallbacks.items())
            sys.stderr.write(f"{params.quant_type} needs rows of a multiple of 256, so llama.cpp used others: {used}\n")
    write_json(resources, usage.figures())
