"""What a GGUF says of itself, and the disk that it needs."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from pipeline.core.stage import Fail
from pipeline.models.gguf import BITS, build
from pipeline.stages.quantize import Params, metadata

HUB = {"source": "hub", "repo_id": "meta-llama/Meta-Llama-3-8B-Instruct"}
PUBMEDQA = {"name": "PubMedQA PQA-L", "dataset": "qiaojin/PubMedQA"}


def test_metadata_of_a_llama_3():
    about = metadata(HUB, PUBMEDQA, "Q4_K_M")
    assert about["general.name"].startswith("Llama-3-8B-")
    assert about["general.license.name"] == "Meta Llama 3 Community License"
    assert about["general.base_models"][0]["repo_url"] == "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct"
    assert about["general.datasets"] == [
        {"name": "PubMedQA PQA-L", "repo_url": "https://huggingface.co/datasets/qiaojin/PubMedQA"}
    ]
    assert "Q4_K_M" in about["general.description"]
    assert "general.version" in about
    assert "general.sampling.temp" in about


@pytest.mark.parametrize(
    "manifest",
    [
        {"source": "tiny"},
        {"source": "local"},
        {"source": "hub", "repo_id": "meta-llama/Llama-3.2-1B-Instruct"},
        {"source": "hub", "repo_id": "meta-llama/Meta-Llama-3.1-8B-Instruct"},
    ],
)
def test_metadata_of_another_base(manifest: dict[str, str]):
    about = metadata(manifest, {"name": "simulated trials"}, "Q8_0")
    assert about["general.name"] == "medical-reasoner"
    assert not [key for key in about if "license" in key]


def test_every_type_has_its_bits():
    assert BITS.keys() == set(get_args(Params.model_fields["quant_type"].annotation))


def test_too_little_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "merged").mkdir()
    with (tmp_path / "merged" / "model.safetensors").open("wb") as file:
        file.truncate(16_060_000_000)  # sparse: it takes no disk
    free: Any = SimpleNamespace(free=20_900_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(Fail, match=r"21\.0 GB of free disk are needed .* and 20\.9 GB are there"):
        build(tmp_path / "merged", tmp_path / "model.gguf", "Q4_K_M", {})
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
