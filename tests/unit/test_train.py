"""What `train` refuses, what it gives the libraries, and the figures that it derives. Training itself: tests/stages."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.sections.train import Train
from pipeline.training.checkpoints import save_steps
from pipeline.training.fit import check_lengths
from pipeline.training.kernels import by_example
from pipeline.training.lora import check_backend, check_modules, unsloth_lora
from pipeline.training.trainer import check_loss, columns, throughput
from tests.conftest import ROOT, yaml

PROJECTIONS = [f"{letter}_proj" for letter in "q k v o gate up down".split()]
LAYERS = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in PROJECTIONS} | {"norm": torch.nn.LayerNorm(1)})


def params(**changes: Any) -> Train:
    return Train.model_validate(yaml.load((ROOT / "profiles/llama3-8b-t4.yaml").read_text())["train"] | changes)


def example(pmid: int, length: int, prompt: int = 1) -> Example:
    return Example(pmid=str(pmid), label="yes", text="", input_ids=list(range(length)), prompt_tokens=prompt)


@pytest.mark.parametrize(("card", "words"), [(False, "needs a CUDA card"), (True, "make setup GPU=1")])
def test_unsloth_without_a_card_or_an_installation_is_refused(monkeypatch: pytest.MonkeyPatch, card: bool, words: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "anywhere")
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(Fail, match=words):
        check_backend(params())


def test_unsloth_gets_a_path_that_it_cannot_take_for_a_repository_and_runs_no_code_and_changed_kernels(
    monkeypatch: pytest.MonkeyPatch,
):
    given: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> tuple[Any, Any]:
        given.update(options, name=name)
        return LAYERS, None

    model = SimpleNamespace(from_pretrained=from_pretrained, get_peft_model=lambda model, **options: model)
    backward = SimpleNamespace(fast_dequantize=lambda weight, use_global_buffer=False: use_global_buffer)
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=model))
    monkeypatch.setitem(sys.modules, "unsloth.kernels", SimpleNamespace(fast_lora=backward))
    attention = SimpleNamespace(_sdpa_packed_segments=None)
    monkeypatch.setitem(sys.modules, "unsloth.utils", SimpleNamespace(attention_dispatch=attention))
    unsloth_lora(params(), Path("models/base"), torch.float16, None, {})
    assert backward.fast_dequantize(None)
    assert attention._sdpa_packed_segments
    assert given["name"] == str(Path.cwd() / "models" / "base")
    assert (given["local_files_only"], given["trust_remote_code"]) == (True, False)


def sliced(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], **options: Any) -> Any:
    """What Unsloth does: a slice of the batch for each example."""
    outs, start = list[torch.Tensor](), 0
    for length in lengths:
        part = (x[:, :, start : start + length] for x in (query, key, value))
        outs.append(scaled_dot_product_attention(*part, is_causal=options["is_causal"], enable_gqa=True))
        start += length
    return torch.cat(outs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_batch_split_into_its_examples_has_unsloths_attention_and_gradients(grouped: bool):
    module = SimpleNamespace(_training_sdpa=scaled_dot_product_attention, _avoids_cudnn=lambda *_: False)
    module._sdpa_takes_gqa = lambda *_: grouped
    options = {"n_groups": 2, "is_causal": True, "sliding_window": None, "sdpa_kwargs": {}, "training": True}
    lengths = [3, 1, 5]
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2)]
    cotangent = torch.randn(1, 9, 4, 8)
    expected, found = (attend(*states, lengths, **options) for attend in (sliced, by_example(module, sliced)))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out, states, cotangent, retain_graph=True) for out in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])
    for other in ({"sliding_window": 4}, {}):  # a window, and lengths that are not the batch's, are left to Unsloth
        short = [3, 1] if not other else lengths
        original = by_example(module, lambda *_, **__: "original")
        assert original(*states, short, **options | other) == "original"


@pytest.mark.parametrize(("names", "wrong"), [(["q_proj", "k_prj"], "k_prj"), (["proj"], "proj"), (["norm"], "norm")])
def test_a_layer_that_the_base_has_not_is_refused(names: list[str], wrong: str):
    check_modules(LAYERS, params(target_modules=["q_proj", "down_proj"]))
    with pytest.raises(Fail, match=rf"train\.target_modules: .* {wrong}; it has .*q_proj"):
        check_modules(LAYERS, params(target_modules=names))


def test_an_example_that_is_too_long_is_refused_by_pmid_and_parameter():
    assert check_lengths([example(1, 5), example(2, 10)], params(max_length=10)) == 2
    with pytest.raises(Fail, match=r"train\.max_length: 2 .* more than 10 .*longest 12, PMID 2.*raise it to 12"):
        check_lengths([example(1, 11), example(2, 12), example(3, 10)], params(max_length=10))


def test_the_loss_is_on_the_answers_tokens_alone():
    assert columns(example(1, 5, prompt=3)) == {"input_ids": [0, 1, 2, 3, 4], "completion_mask": [0, 0, 0, 1, 1]}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(loss: float):
    check_loss(2.5, "step 1", "train")
    with pytest.raises(Fail, match=rf"the loss at step 2 is {loss}; lower train\.learning_rate"):
        check_loss(loss, "step 2", "train")


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "many", "²"])
def test_the_interval_of_checkpoints_is_a_whole_number_in_the_environment(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("SAVE_STEPS", "7")
    assert save_steps() == 7
    monkeypatch.setenv("SAVE_STEPS", value)
    with pytest.raises(Fail, match="SAVE_STEPS"):
        save_steps()


def test_throughput_leaves_the_warm_up_out():
    seconds, tokens = (9.0, 10.0, 2.0, 2.0), (1000, 2000, 3000, 4000)
    steps = [{"seconds": s, "num_input_tokens_seen": n} for s, n in zip(seconds, tokens, strict=True)]
    found = [throughput(steps, 0), throughput(steps, 1), throughput(steps, 9), throughput(steps[:1], 0)]
    assert found == pytest.approx([3000 / 14, 2000 / 4, 0, 0])
