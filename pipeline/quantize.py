"""Quantize: models/merged -> models/medical-reasoner.gguf, the file that ships.

llama.cpp's converter writes a temporary 16-bit GGUF, its quantizer turns that into, for example, Q4_K_M.
"""

from pathlib import Path
from typing import Any, Literal

from pipeline.gguf import build
from pipeline.records import read_json, write_json
from pipeline.stage import Section, Usage, run, writing
from pipeline.weights import MANIFEST, check_whole

VERSION = "0.1.0"


class Params(Section):
    quant_type: Literal["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "Q8_0", "Q3_K_M", "IQ4_XS"]


def metadata(manifest: dict[str, Any]) -> dict[str, Any]:
    """GGUF metadata (keys: gguf's docs/gguf.md): what the file is, where it comes from, how to sample from it."""
    base = manifest.get("repo_id", f"{manifest['source']} base")
    # The Llama 3 licence wants names of derivatives to begin with Llama 3 (section 1.b.i).
    name = "Llama-3-8B-medical-reasoner" if "Llama-3" in base else "medical-reasoner"
    return {
        "general.name": name,
        "general.version": VERSION,
        "general.description": f"{base}, fine-tuned by medical-reasoner. Not for clinical use.",
        "general.sampling.temp": 0.0,
    }


def main(merged: Path, gguf: Path, resources: Path) -> None:
    """Write GGUF."""
    usage = Usage()
    params = Params.load("quantize")
    check_whole(sorted(merged.glob("*.safetensors")))
    with writing(gguf) as partial:
        build(merged, partial, params.quant_type, metadata(read_json(merged / MANIFEST)))
    write_json(resources, usage.figures())


if __name__ == "__main__":
    run(main)
