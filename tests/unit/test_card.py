"""A GGUF that a card cannot hold is refused before llama.cpp loads it, with what fits instead."""

from pathlib import Path

import pytest
from llama_cpp import llama_supports_gpu_offload

from pipeline.commands import ask
from pipeline.core.errors import Fail
from pipeline.models import card
from pipeline.models.gguf_header import read_header
from pipeline.models.memory import MIB, Load, Shape
from pipeline.models.sizes import write_sparse
from tests.tables import write_gguf

SHAPE = Shape(layers=8, hidden=1024, inner=4096, heads=8, kv_heads=8, head_width=128, vocabulary=32768, tied=False)
LOAD = Load(4096, 512, "f16", flash_attention=False, n_outputs=65)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file of 391 MiB; beside it, in a directory, one of half the layers, and a file that is no model."""
    (tmp_path / "quantized").mkdir()
    (tmp_path / "imatrix.gguf").write_bytes(b"GGUF")
    write_sparse(tmp_path / "quantized" / "small.gguf", SHAPE._replace(layers=4))
    write_sparse(tmp_path / "large.gguf", SHAPE)
    return tmp_path / "large.gguf"


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (440, ["takes about 531 MiB", "440 MiB are free", "quantized/small.gguf, which", "N_GPU_LAYERS=7"]),
        (400, ["use the smaller file, --gguf ", "quantized/small.gguf, which", "set N_GPU_LAYERS="]),
        (100, ["large.gguf takes about", "set N_GPU_LAYERS=0"]),
        (0, ["0 MiB are free", "set N_GPU_LAYERS=0"]),
    ],
)
def test_a_file_that_cannot_fit_names_a_smaller_one_that_does(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, free: int, words: list[str]
):
    monkeypatch.setattr(card, "free_memory", lambda: free * MIB)
    with pytest.raises(Fail) as raised:
        card.check_room(gguf, read_header(gguf), LOAD, 999)
    assert [word for word in words if word not in str(raised.value)] == [], raised.value
    assert ("small.gguf" in str(raised.value)) == (free >= 400)


@pytest.mark.parametrize(("free", "layers"), [(100, 0), (None, 999), (1000, 999), (200, 1)])
def test_a_file_that_may_fit_is_not_refused(gguf: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, layers: int):
    monkeypatch.setattr(card, "free_memory", lambda: None if free is None else free * MIB)
    assert "N_GPU_LAYERS=" in card.check_room(gguf, read_header(gguf), LOAD, layers)


def test_room_is_checked_if_and_only_if_llama_cpp_uses_a_card():
    assert (card.free_memory() is not None) == llama_supports_gpu_offload()


def test_ask_refuses_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(card, "free_memory", lambda: 100 * MIB)
    with pytest.raises(Fail, match="100 MiB are free; set N_GPU_LAYERS="):
        ask.main("Does it help?", None, tmp_path / "model.gguf", "f16")
