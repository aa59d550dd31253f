"""Merging as a stream: the right sum in the base's own type, and a base that is not the manifest's is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core.stage import Fail
from pipeline.stages.merge import check_adapter, fold, merge_file, read_adapter

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_with_the_sum_in_it(tmp_path: Path, dtype: torch.dtype):
    torch.manual_seed(0)
    weights = {NAME: torch.randn(24, 16).to(dtype), "model.norm.weight": torch.ones(16, dtype=dtype)}
    save_file(weights, tmp_path / "in.safetensors", metadata={"format": "pt"})
    pair = (torch.randn(4, 16), torch.randn(24, 4))
    names, digest = merge_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", {NAME: pair}, 0.5)
    assert names == {NAME}
    assert digest == hashlib.sha256((tmp_path / "in.safetensors").read_bytes()).hexdigest()
    merged = load_file(tmp_path / "out.safetensors")
    expected = (weights[NAME].double() + 0.5 * pair[1].double() @ pair[0].double()).to(dtype)
    assert torch.allclose(merged[NAME].double(), expected.double(), rtol=2**-7, atol=1e-6)
    assert torch.equal(merged["model.norm.weight"], weights["model.norm.weight"])
    assert torch.equal(load_file(tmp_path / "in.safetensors")[NAME], weights[NAME])  # in place, but not on the disk


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_sum_that_is_no_number(bad: float):
    a, b = torch.full((1, 2), bad), torch.ones(2, 1)
    with pytest.raises(Fail, match="w: the merged weight is not finite"):
        fold(torch.zeros(2, 2, dtype=torch.float16), (a, b), 1.0, "w")


@pytest.mark.parametrize("bad", [1e30, -1e30])
def test_one_number_beyond_the_type_is_enough(bad: float):
    a, b = torch.tensor([[bad, 0.0]]), torch.ones(2, 1)
    with pytest.raises(Fail, match="w: the merged weight is not finite"):
        fold(torch.zeros(2, 2, dtype=torch.float16), (a, b), 1.0, "w")


def test_the_weight_that_came_in_stays_as_it_was():
    weight = torch.zeros(2, 2)
    assert fold(weight, (torch.ones(1, 2), torch.ones(2, 1)), 0.5, "w").equal(torch.full((2, 2), 0.5))
    assert weight.equal(torch.zeros(2, 2))


def test_a_pair_of_another_shape():
    with pytest.raises(Fail, match=r"w: the adapter's shape \(2, 3\) is not the base's \(2, 2\)"):
        fold(torch.zeros(2, 2), (torch.ones(1, 3), torch.ones(2, 1)), 1.0, "w")


FILES = [{"name": "model.safetensors", "size": 3, "sha256": "0" * 64}]
CONFIG = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_dora": False, "fan_in_fan_out": False}


def check(directory: Path, changes: dict[str, Any], files: Any = FILES) -> dict[str, Any]:
    """`check_adapter` on an adapter for `files`, against a base of FILES."""
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "trained_on.json").write_text(json.dumps({"files": files}))
    return check_adapter(directory, {"files": FILES})


@pytest.mark.parametrize("changes", [{}, {"r": 1, "lora_alpha": 999_999}, {"lora_alpha": 0.5}, {"rank_pattern": {}}])
def test_an_adapter_that_a_plain_sum_merges(tmp_path: Path, changes: dict[str, Any]):
    assert check(tmp_path, changes) == CONFIG | changes


@pytest.mark.parametrize("value", [0, -1, True, None, "16", 1_000_000, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_scale_that_is_no_number_above_0(tmp_path: Path, name: str, value: Any):
    with pytest.raises(Fail, match=f"{name} is no number above 0"):
        check(tmp_path, {name: value})


@pytest.mark.parametrize("changes", [{"peft_type": "IA3"}, {"peft_type": None}, {"fan_in_fan_out": True}])
def test_what_is_no_lora_as_train_writes_it(tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(Fail, match="is not that of a LoRA"):
        check(tmp_path, changes)


@pytest.mark.parametrize(
    "option", ["use_dora", "use_rslora", "modules_to_save", "alpha_pattern", "rank_pattern", "lora_bias"]
)
def test_more_than_a_sum(tmp_path: Path, option: str):
    with pytest.raises(Fail, match=f"{option} is set, and merge cannot fold it in"):
        check(tmp_path, {option: ["x"]})


@pytest.mark.parametrize("files", [[], None, [FILES[0] | {"sha256": "1" * 64}], [*FILES, *FILES]])
def test_an_adapter_of_other_weights(tmp_path: Path, files: Any):
    with pytest.raises(Fail, match="was trained on other weights"):
        check(tmp_path, {}, files)


def vouch(adapter: Path) -> None:
    """Write the adapter's sha256 beside it, as `train` does."""
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    (adapter / "trained_on.json").write_text(json.dumps({"adapter": digest, "files": FILES}))


@pytest.mark.parametrize(("a", "b"), [((4, 16), (24, 8)), ((16,), (24, 4)), ((4, 16), (24,)), ((4, 16, 1), (24, 4))])
def test_matrices_whose_shapes_no_lora_has(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]):
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    tensors = {f"{module}.lora_A.weight": torch.zeros(a), f"{module}.lora_B.weight": torch.zeros(b)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    vouch(tmp_path)
    with pytest.raises(Fail, match="shapes that no LoRA has"):
        read_adapter(tmp_path)


def test_an_adapter_of_which_one_weight_was_altered(tmp_path: Path):
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    save_file(
        {f"{module}.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}, tmp_path / "adapter_model.safetensors"
    )
    vouch(tmp_path)
    read_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(Fail, match="is not as `train` wrote it"):
        read_adapter(tmp_path)


def test_the_pairs_of_an_adapter_by_the_bases_own_names(tmp_path: Path):
    module = NAME.removesuffix(".weight")
    pair = torch.randn(4, 16), torch.randn(24, 4)
    tensors = {f"base_model.model.{module}.lora_{side}.weight": m for side, m in zip("AB", pair, strict=True)}
    save_file({name: matrix.half() for name, matrix in tensors.items()}, tmp_path / "adapter_model.safetensors")
    vouch(tmp_path)
    ((name, found),) = read_adapter(tmp_path).items()
    assert name == NAME
    assert [matrix.dtype for matrix in found] == [torch.float32] * 2
    assert all(torch.equal(one, other.half().float()) for one, other in zip(found, pair, strict=True))
