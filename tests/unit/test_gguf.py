"""What a GGUF says about itself, and the disk that it needs."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from pipeline.core.errors import Fail
from pipeline.core.source import Source
from pipeline.models.gguf import BITS, check_disk
from pipeline.models.gguf_header import LICENCE, SYSTEM_PROMPT
from pipeline.models.gguf_metadata import metadata
from pipeline.models.manifest import Manifest
from pipeline.sections.quantize import QuantType

KEYS = ("base_models", "datasets")
SOURCE = Source(simulated=False, name="mine", licence="", dataset="o/d", records="a", test_ground_truth="b")


def manifest(source: str, repo_id: str = "", size: int = 1) -> Manifest:
    file = {"name": "model.safetensors", "size": size, "sha256": "0" * 64}
    return Manifest.model_validate({"source": source, "repo_id": repo_id, "files": [file]}, strict=False)


def test_a_llama_3_keeps_its_name_and_licence_and_the_file_says_what_it_was_made_of():
    about = metadata(manifest("hub", "meta-llama/Meta-Llama-3-8B-Instruct"), SOURCE, "Be brief.")
    assert about["general.name"].startswith("Llama-3-8B-")
    assert (about[LICENCE], about[SYSTEM_PROMPT]) == ("Meta Llama 3 Community License", "Be brief.")
    places = [about[f"general.{key}"][0]["repo_url"].removeprefix("https://huggingface.co/") for key in KEYS]
    assert places == ["meta-llama/Meta-Llama-3-8B-Instruct", "datasets/o/d"]


@pytest.mark.parametrize("repo_id", ["", "m/Llama-3.2-1B-Instruct", "m/Llama-3.1-8B-Instruct"])
def test_another_base_gets_neither(repo_id: str):
    about = metadata(manifest("hub" if repo_id else "tiny", repo_id), SOURCE, "")
    assert (about["general.name"], [key for key in about if "license" in key]) == ("medical-reasoner", [])


def test_every_type_has_its_bits():
    assert BITS.keys() == set(get_args(QuantType))


def test_too_little_disk_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free: Any = SimpleNamespace(free=20_900_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check_disk(manifest("tiny", size=16_060_000_000), tmp_path, 1.3)
    with pytest.raises(Fail, match=r"21\.0 GB .* 20\.9 GB"):
        check_disk(manifest("tiny", size=16_060_000_000), tmp_path, 1.306)
