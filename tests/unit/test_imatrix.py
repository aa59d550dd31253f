"""The importance matrix: its file, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.models import imatrix
from pipeline.models.imatrix import Entry
from pipeline.sections.quantize import Quantize, texts

MATRIX = {"blk.0.attn_q.weight": Entry(np.array([2.0, 8.0, 0.0]), 4)}


def test_the_file_is_that_of_llama_cpps_tool_and_reads_back(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "a.gguf", MATRIX, 2)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name and name[:4] != "GGUF"}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["training questions"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 2,
    }
    found = {tensor.name: (tensor.shape.tolist(), tensor.data.tolist()) for tensor in reader.tensors}
    assert found == {
        "blk.0.attn_q.weight.in_sum2": ([3, 1], [[2.0, 8.0, 0.0]]),
        "blk.0.attn_q.weight.counts": ([1, 1], [[4.0]]),
    }
    (read,) = imatrix.read(tmp_path / "a.gguf").values()
    assert read.importance.tolist() == [0.5, 2.0, 0.0]


def test_without_questions_the_file_has_no_entries(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "a.gguf", {}, 0)
    assert imatrix.read(tmp_path / "a.gguf") == {}


@pytest.mark.parametrize(
    ("matrices", "tokens", "values", "words"),
    [
        (["blk.0.attn_q.weight", "blk.1.attn_q.weight"], 4, [1.0], "1 of 2 matrices, such as blk.1"),
        (
            ["blk.0.attn_q.weight"],
            9,
            [1.0],
            "have no importance",
        ),  # the last block, with logits of the last token alone
        (["blk.0.attn_q.weight"], 4, [np.inf], "not finite"),
    ],
)
def test_a_matrix_without_a_whole_entry_is_refused(
    matrices: list[str], tokens: int, values: list[float], words: str
) -> None:
    with pytest.raises(Fail, match=words):
        imatrix.check({"blk.0.attn_q.weight": Entry(np.array(values), 4)}, matrices, tokens)


def test_it_takes_the_first_training_questions_and_refuses_more_than_there_are() -> None:
    rows = [Example(pmid=str(n), label="yes", text="", input_ids=[n, n], prompt_tokens=1) for n in range(3)]
    assert texts(2, rows) == [[0, 0], [1, 1]]
    with pytest.raises(Fail, match="is 4, and there are 3"):
        texts(4, rows)


@pytest.mark.parametrize(
    ("types", "questions", "words"),
    [
        (["Q4_K_M", "IQ3_XS"], 0, "IQ3_XS needs an importance matrix"),
        (["Q4_K_M", "Q4_K_M"], 9, "duplicates"),
        ([], 9, "at least 1 item"),
        (["F16"], 9, "Input should be"),
    ],
)
def test_a_list_of_types_that_llama_cpp_would_refuse_is_refused(types: list[str], questions: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Quantize.model_validate({"quant_types": types, "imatrix_questions": questions})


@pytest.mark.parametrize(("layers", "card", "tried"), [(32, True, 10), (4, True, 6), (32, False, 1)])
def test_a_model_that_no_card_holds_is_loaded_into_main_memory(layers: int, card: bool, tried: int) -> None:
    loaded: list[int] = []

    def load_model(path: bytes, params: Any) -> str:
        loaded.append(params.n_gpu_layers)
        return "model"

    lib = SimpleNamespace(
        llama_model_default_params=SimpleNamespace,
        llama_context_default_params=SimpleNamespace,
        llama_supports_gpu_offload=lambda: card,
        llama_model_load_from_file=load_model,
        llama_init_from_model=lambda model, options: None if loaded[-1] else "context",
        llama_model_free=lambda model: None,
    )
    assert imatrix.load(lib, Path("wide.gguf"), layers, 512, None) == ("model", "context")
    assert (len(loaded), loaded[-1]) == (tried, 0)
