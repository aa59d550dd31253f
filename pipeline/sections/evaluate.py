"""Sections `evaluate` and `reference`: how a GGUF is asked the test questions."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.core.params import Section

Context = Annotated[int, Field(ge=64, le=1 << 20)]  # tokens
Answer = Annotated[int, Field(ge=1, le=64)]  # tokens of the greedy answer
CacheType = Literal["f16", "q8_0"]  # of keys and values; llama.cpp's name
ProtocolName = Literal["chat", "lm_eval", "question_only"]


def with_chat(protocols: list[ProtocolName]) -> list[ProtocolName]:
    """Require `chat`, which every comparison needs, and refuse duplicates."""
    if "chat" not in protocols or len(set(protocols)) < len(protocols):
        raise ValueError("must contain chat, and each protocol once")
    return protocols


class Evaluate(Section):
    """Protocols and room for the prompts."""

    protocols: Annotated[list[ProtocolName], AfterValidator(with_chat)]
    n_ctx: Context
    cache_type: CacheType  # also of `reference`; changes log-probabilities
    max_new_tokens: Answer


class Reference(Section):
    """Whether and how the merged model is measured at 16 bits; only the protocol chat is asked."""

    enabled: bool
    n_ctx: Context
    max_new_tokens: Answer
