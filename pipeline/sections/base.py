"""Section `base`: the model that is fine-tuned."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipeline.core.params import Section


class Hub(Section):
    """A repository of the Hugging Face hub at a commit: a branch would move."""

    source: Literal["hub"]
    repo_id: Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$")]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class Local(Section):
    """A transformers model directory."""

    source: Literal["local"]
    path: Annotated[str, Field(min_length=1)]


class Tiny(Section):
    """The tiny Llama that is shipped in pipeline/simulated/tiny_base."""

    source: Literal["tiny"]


BASE: TypeAdapter[Hub | Local | Tiny] = TypeAdapter(Annotated[Hub | Local | Tiny, Field(discriminator="source")])
