"""Section `format`: prompts and splits."""

from typing import Annotated

from pydantic import Field

from pipeline.core.params import Section


class Format(Section):
    """How the questions are split and asked."""

    system_prompt: Annotated[str, Field(min_length=1)]
    validation_questions: Annotated[int, Field(gt=0)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
