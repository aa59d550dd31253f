"""Section `pretrain`: a first phase of training on artificial questions, or none."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from pipeline.core.params import Section
from pipeline.sections.train import Train


class NoPretraining(Section):
    """`train` starts from the base alone."""

    source: Literal["none"]


class Pretrain(Train):
    """A parquet file in PQA-A's schema from a dataset of the hub, and the parameters of `train` for this phase.

    Examples of more than `max_length` tokens are left out.
    """

    section: ClassVar[str] = "pretrain"

    source: Literal["hub"]
    repo_id: Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.-]+$")]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    file: Annotated[str, Field(pattern=r"^([\w-][\w.-]*/)*[\w-][\w.-]*\.parquet$")]


PRETRAIN: TypeAdapter[NoPretraining | Pretrain] = TypeAdapter(
    Annotated[NoPretraining | Pretrain, Field(discriminator="source")]
)
