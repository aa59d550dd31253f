"""A training or validation example: a line of data/formatted/train.jsonl and validation.jsonl."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pipeline.core.labels import Label


class Example(BaseModel):
    """Token ids of prompt and answer in the base's chat template, special tokens included."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    pmid: str
    label: Label
    text: str  # abstract and question as plain text, for the text baselines
    input_ids: Annotated[list[int], Field(min_length=2)]
    prompt_tokens: Annotated[int, Field(gt=0)]  # leading ids that are the prompt: no loss is taken on them
