"""Quantize: models/merged -> models/medical-reasoner.gguf, the file that ships.

llama.cpp's converter writes a temporary 16-bit GGUF, its quantizer turns that into, for example, Q4_K_M.
"""

import re
from pathlib import Path
from typing import Any, Literal

from pipeline.core.records import read_examples, read_object, write_json
from pipeline.core.stage import Section, Usage, run, writing
from pipeline.models.gguf import build
from pipeline.models.gguf_header import LICENCE, LLAMA_3_LICENCE, SYSTEM_PROMPT
from pipeline.models.weights import check_whole, read_manifest

VERSION = "0.1.0"
LLAMA_3 = r"Llama-3(?![.\d])"  # in a base's name; Llama 3.1 and those that followed have licences of their own


class Params(Section):
    quant_type: Literal["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "Q8_0", "Q3_K_M", "IQ4_XS"]


def metadata(manifest: dict[str, Any], source: dict[str, Any], quant_type: str) -> dict[str, Any]:
    """GGUF metadata (keys: gguf's docs/gguf.md): what the file is, where it comes from, how to sample from it."""
    base = manifest.get("repo_id", f"{manifest['source']} base")
    about = {
        "general.name": "medical-reasoner",
        "general.version": VERSION,
        "general.description": f"{base}, fine-tuned by medical-reasoner, {quant_type}. Not for clinical use.",
        "general.quantized_by": f"medical-reasoner {VERSION}",
        "general.datasets": [{"name": source["name"], "repo_url": hub_page(source.get("dataset"), "datasets/")}],
        "general.base_models": [{"name": base, "repo_url": hub_page(manifest.get("repo_id"), "")}],
        "general.sampling.temp": 0.0,
    }
    if not re.search(LLAMA_3, base):
        return about
    return {
        **about,
        # The licence wants names of derivatives to begin with Llama 3 (section 1.b.i).
        "general.name": "Llama-3-8B-medical-reasoner",
        LICENCE: LLAMA_3_LICENCE,
        "general.license.link": "https://llama.meta.com/llama3/license",
    }


def hub_page(repo_id: str | None, kind: str) -> str:
    """The address of a repository's page on the hub; empty if it is on none."""
    return f"https://huggingface.co/{kind}{repo_id}" if repo_id else ""


def main(merged: Path, source: Path, validation: Path, gguf: Path, resources: Path) -> None:
    """Write GGUF; SOURCE says where the data come from, VALIDATION holds the system prompt of the training."""
    usage = Usage()
    params = Params.load("quantize")
    manifest = read_manifest(merged)
    check_whole([merged / file["name"] for file in manifest["files"]])
    about = metadata(manifest, read_object(source, "name"), params.quant_type)
    about[SYSTEM_PROMPT] = read_examples(validation)[0]["prompt"][0]["content"]
    with writing(gguf) as partial:
        build(merged, partial, params.quant_type, about)
    write_json(resources, usage.figures())


if __name__ == "__main__":
    run(main)
