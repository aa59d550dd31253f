"""`merge`: the sum is correct in the type of the base, and the base and the adapter must belong together."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core.errors import Fail
from pipeline.models.manifest import Manifest
from pipeline.stages.merge import check_adapter, fold, merge_file, read_adapter

NAME = "model.layers.0.mlp.up_proj.weight"
FILES = [{"name": "model.safetensors", "size": 3, "sha256": "0" * 64}]
CONFIG = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_dora": False, "fan_in_fan_out": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_is_written_with_the_sum_rounded_once(tmp_path: Path, dtype: torch.dtype):
    torch.manual_seed(0)
    weights = {NAME: torch.randn(24, 16).to(dtype), "model.norm.weight": torch.ones(16, dtype=dtype)}
    save_file(weights, tmp_path / "in.safetensors", metadata={"format": "pt"})
    a, b = torch.randn(4, 16), torch.randn(24, 4)
    names, digest = merge_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", {NAME: (a, b)}, 0.5)
    assert (names, digest) == ({NAME}, hashlib.sha256((tmp_path / "in.safetensors").read_bytes()).hexdigest())
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged[NAME], (weights[NAME].float() + 0.5 * b @ a).to(dtype))
    assert torch.equal(merged["model.norm.weight"], weights["model.norm.weight"])


def test_the_sum_is_accumulated_in_float32():
    weight = torch.zeros(1, 1, dtype=torch.bfloat16)
    pair = torch.tensor([[1 + 2.0**-9], [-1.0]]), torch.ones(1, 2)  # in bfloat16, 1 + 2**-9 is 1
    assert fold(weight, pair, 1.0, "w").item() == 2.0**-9
    assert weight.item() == 0  # what came in stays as it was


@pytest.mark.parametrize(
    ("shape", "bad", "words"),
    [*(((1, 2), bad, "not finite") for bad in (float("nan"), 1e30, -1e30)), ((1, 3), 0, r"is \(2, 3\), .* \(2, 2\)")],
)
def test_a_sum_that_is_not_finite_or_of_another_shape_is_refused(shape: Any, bad: float, words: str):
    a = torch.zeros(shape)
    a[0, 0] = bad
    with pytest.raises(Fail, match=f"^w: .*{words}"):
        fold(torch.zeros(2, 2, dtype=torch.float16), (a, torch.ones(2, 1)), 1.0, "w")


def check(directory: Path, changes: dict[str, Any], files: Any = FILES) -> dict[str, Any]:
    """`check_adapter` on an adapter for `files`, against a base of FILES."""
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "trained_on.json").write_text(json.dumps({"adapter": "0" * 64, "files": files}))
    return check_adapter(directory, Manifest.model_validate({"source": "tiny", "files": FILES}))


@pytest.mark.parametrize("changes", [{}, {"r": 1, "lora_alpha": 999_999}, {"lora_alpha": 0.5}, {"rank_pattern": {}}])
def test_an_adapter_that_a_plain_sum_merges_is_accepted(tmp_path: Path, changes: dict[str, Any]):
    assert check(tmp_path, changes) == CONFIG | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({name: value}, f"{name} must be a number")
            for name in ("r", "lora_alpha")
            for value in (0, -1, True, None, "16", float("nan"), float("inf"), 10**400)
        ),
        *((changes, "is not that of a LoRA") for changes in ({"peft_type": "IA3"}, {"fan_in_fan_out": True})),
        *(
            ({option: ["x"]}, f"{option} is set")
            for option in "use_dora use_rslora modules_to_save alpha_pattern rank_pattern lora_bias".split()
        ),
    ],
)
def test_more_than_a_plain_sum_is_refused(tmp_path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(Fail, match=words):
        check(tmp_path, changes)


@pytest.mark.parametrize("files", [[], [FILES[0] | {"sha256": "1" * 64}], [*FILES, *FILES]])
def test_an_adapter_of_other_weights_is_refused(tmp_path: Path, files: Any):
    with pytest.raises(Fail, match="was trained on other weights"):
        check(tmp_path, {}, files)


def save_adapter(directory: Path, a: torch.Tensor, b: torch.Tensor) -> Path:
    """Write an adapter and its sha256, as `train` does."""
    path = directory / "adapter_model.safetensors"
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, path)
    identity = {"adapter": hashlib.sha256(path.read_bytes()).hexdigest(), "files": FILES}
    (directory / "trained_on.json").write_text(json.dumps(identity))
    return path


def test_the_pairs_of_an_adapter_have_the_bases_names_and_are_float32(tmp_path: Path):
    a, b = torch.randn(4, 16).half(), torch.randn(24, 4).half()
    save_adapter(tmp_path, a, b)
    [(name, (found_a, found_b))] = read_adapter(tmp_path).items()
    assert (name, found_a.dtype, found_b.dtype) == (NAME, torch.float32, torch.float32)
    assert (torch.equal(found_a, a.float()), torch.equal(found_b, b.float())) == (True, True)


@pytest.mark.parametrize(("a", "b"), [((4, 16), (24, 8)), ((16,), (24, 4)), ((4, 16), (24,)), ((4, 16, 1), (24, 4))])
def test_matrices_that_disagree_on_the_rank_are_named_with_their_shapes(tmp_path: Path, a: Any, b: Any):
    save_adapter(tmp_path, torch.zeros(a), torch.zeros(b))
    with pytest.raises(Fail) as failure:
        read_adapter(tmp_path)
    assert f"A and B disagree on the rank: A (r, in) = {a}, B (out, r) = {b}" in str(failure.value)


def test_an_adapter_of_which_one_byte_was_altered_is_refused(tmp_path: Path):
    path = save_adapter(tmp_path, torch.zeros(4, 4), torch.zeros(4, 4))
    read_adapter(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(Fail, match="not as `train` wrote it"):
        read_adapter(tmp_path)
