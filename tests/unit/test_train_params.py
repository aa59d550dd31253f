"""What `train` refuses, and the figures that it derives. The training itself: tests/stages."""

from typing import Any

import pytest

from pipeline.core.stage import Fail
from pipeline.stages.train import Params, check_lengths, check_losses, throughput
from tests.conftest import ROOT, yaml

VALUES: dict[str, Any] = yaml.load((ROOT / "profiles" / "micro.yaml").read_text())["train"]


def test_the_micro_profile_is_valid():
    params = Params.check("train", VALUES)
    assert (params.r, params.lora_alpha, params.learning_rate) == (16, 16, 2e-4)


@pytest.mark.parametrize("name", VALUES)
def test_every_parameter_is_required(name: str):
    with pytest.raises(Fail, match=rf"train\.{name}: Field required"):
        Params.check("train", {key: value for key, value in VALUES.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "axolotl"),
        ("seed", "3407"),
        ("r", 0),
        ("lora_alpha", -1),
        ("lora_dropout", 1.0),
        ("target_modules", []),
        ("target_modules", "all-linear"),
        ("bnb_4bit_quant_type", "int4"),
        ("bnb_4bit_use_double_quant", "yes"),
        ("dtype", "int8"),
        ("max_length", 0),
        ("max_steps", 60.0),
        ("save_steps", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("gradient_checkpointing", "unsloth"),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("learning_rate", "2e-4"),
        ("lr_scheduler_type", "triangle"),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0),
        ("optim", "sgd"),
    ],
)
def test_a_value_out_of_range(name: str, value: object):
    with pytest.raises(Fail, match=rf"train\.{name}\b"):
        Params.check("train", VALUES | {name: value})


def test_a_long_example_is_refused_by_pmid_and_parameter():
    class Tokenizer:
        """One token a word."""

        def apply_chat_template(self, chats: list[list[dict[str, str]]], **options: object) -> list[list[int]]:
            return [[7] * sum(len(message["content"].split()) for message in chat) for chat in chats]

    def rows(*lengths: int) -> list[dict[str, Any]]:
        prompt = [{"role": "user", "content": "Why not ?"}]
        return [
            {"pmid": str(pmid), "prompt": prompt, "completion": [{"role": "assistant", "content": "w " * (length - 3)}]}
            for pmid, length in enumerate(lengths, 1)
        ]

    check_lengths(rows(5, 10), Tokenizer(), 10)
    with pytest.raises(Fail) as failure:
        check_lengths(rows(11, 12, 10), Tokenizer(), 10)
    sentence = str(failure.value)
    for word in ("train.max_length", "2 examples", "more than 10", "the longest 12, PMID 2", "raise it to 12"):
        assert word in sentence


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(loss: float):
    check_losses([2.5, 1.0, 1.5])
    with pytest.raises(Fail, match=rf"the loss is {loss} after step 2; lower train\.learning_rate"):
        check_losses([2.5, loss, loss, 1.5])
    with pytest.raises(Fail, match="after step 3"):
        check_losses([2.5, 1.0, 1.5, loss])  # the validation's, after the last step


def test_throughput_leaves_the_warm_up_out():
    seconds, tokens = (9.0, 10.0, 2.0, 2.0), (1000, 2000, 3000, 4000)
    steps = [{"seconds": s, "num_input_tokens_seen": n} for s, n in zip(seconds, tokens, strict=True)]
    assert throughput(steps, 0) == pytest.approx(3000 / 14)
    assert throughput(steps, 1) == pytest.approx(2000 / 4)
    assert throughput(steps, 9) == 0.0
    assert throughput(steps[:1], 0) == 0.0
