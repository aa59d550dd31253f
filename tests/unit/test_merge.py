"""Merging as a stream: the right sum in the base's own type, and a base that is not the manifest's is refused."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.merge import fold, merge_file
from pipeline.stage import Fail

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


def test_a_pair_of_another_shape():
    with pytest.raises(Fail, match=r"w: the adapter's shape \(2, 3\) is not the base's \(2, 2\)"):
        fold(torch.zeros(2, 2), (torch.ones(1, 3), torch.ones(2, 1)), 1.0, "w")
