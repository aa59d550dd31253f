"""Which pre-tokenizer of llama.cpp a tokenizer.json is taken for."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from pipeline.models.converter import LLAMA_3, pre_tokenizer
from pipeline.models.directory import TINY_BASE


def gpt2(**options: Any) -> Any:
    tokenizer: Any = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def with_step(step: Any, **options: Any) -> Any:
    tokenizer = gpt2(**options)
    tokenizer.pre_tokenizer = step
    return tokenizer


def normalized() -> Any:
    tokenizer = gpt2()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def llama3(pattern: str, behavior: str = "isolated") -> Any:
    return Sequence([Split(Regex(pattern), behavior), ByteLevel(add_prefix_space=False, use_regex=False)])


def test_gpt_2_and_llama_3_are_known_by_their_structure():
    assert pre_tokenizer(gpt2()) == "gpt-2"
    assert pre_tokenizer(with_step(ByteLevel(add_prefix_space=False, trim_offsets=False))) == "gpt-2"
    assert pre_tokenizer(with_step(llama3(LLAMA_3), ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer(Tokenizer.from_file(str(TINY_BASE / "tokenizer.json"))) == "llama-bpe"


OTHERS: dict[str, Callable[[], Any]] = {
    "a space before the text": lambda: with_step(ByteLevel(add_prefix_space=True)),
    "no regular expression": lambda: with_step(ByteLevel(add_prefix_space=False, use_regex=False)),
    "a step before": lambda: with_step(Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
    "no step": lambda: Tokenizer(models.BPE()),
    "a normalizer": normalized,
    "words in one piece": lambda: gpt2(ignore_merges=True),
    "an end of words": lambda: gpt2(end_of_word_suffix="</w>"),
    "dropout": lambda: gpt2(dropout=0.1),
    "another model": lambda: Tokenizer(models.WordLevel({"a": 0}, "a")),
    "Llama 3's split with merges": lambda: with_step(llama3(LLAMA_3)),
    "another pattern": lambda: with_step(llama3(LLAMA_3.replace("{1,3}", "")), ignore_merges=True),
    "another behaviour": lambda: with_step(llama3(LLAMA_3, "removed"), ignore_merges=True),
}


@pytest.mark.parametrize("other", OTHERS)
def test_any_other_structure_is_not_known(other: str):
    assert pre_tokenizer(OTHERS[other]()) is None
