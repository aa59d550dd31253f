"""Metadata of the GGUF that ships: what it is, where it comes from, how to sample from it.

The keys are those of gguf's docs/gguf.md.
"""

import re
from typing import Any

from pipeline.core.source import Source
from pipeline.models.gguf_header import LICENCE, LLAMA_3_LICENCE, SYSTEM_PROMPT
from pipeline.models.manifest import Manifest

VERSION = "0.2.0"
LLAMA_3 = r"Llama-3(?![.\d])"  # in a base's name; Llama 3.1 and later have licences of their own


def metadata(manifest: Manifest, source: Source, system_prompt: str) -> dict[str, Any]:
    """Key -> value for the converter."""
    base = manifest.name
    about = {
        "general.name": "medical-reasoner",
        "general.version": VERSION,
        "general.description": f"{base}, fine-tuned by medical-reasoner. Not for clinical use.",
        "general.quantized_by": f"medical-reasoner {VERSION}",
        "general.datasets": [{"name": source.name, "repo_url": hub_page(source.dataset, "datasets/")}],
        "general.base_models": [{"name": base, "repo_url": hub_page(manifest.repo_id, "")}],
        "general.sampling.temp": 0.0,
        SYSTEM_PROMPT: system_prompt,
    }
    if not re.search(LLAMA_3, base):
        return about
    return {
        **about,
        # The licence requires names of derivatives to begin with Llama 3 (section 1.b.i).
        "general.name": "Llama-3-8B-medical-reasoner",
        LICENCE: LLAMA_3_LICENCE,
        "general.license.link": "https://llama.meta.com/llama3/license",
    }


def hub_page(repo_id: str, kind: str) -> str:
    """The address of a repository's page on the hub; empty if it has none."""
    return f"https://huggingface.co/{kind}{repo_id}" if repo_id else ""
