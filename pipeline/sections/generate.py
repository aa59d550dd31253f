"""Section `generate`: the whole answers that base and tuned model write to the test questions."""

from typing import Annotated

from pydantic import Field

from pipeline.core.params import Section
from pipeline.sections.evaluate import Context


class Generate(Section):
    """Whether answers are written, and the room for prompts and answers."""

    enabled: bool
    n_ctx: Context
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)]  # an answer is cut there
