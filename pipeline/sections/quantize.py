"""Section `quantize`: the types of the GGUF files."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.params import Section

QuantType = Literal[
    "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XS", "IQ3_XXS"
]
NEED_MATRIX = ("IQ3_XS", "IQ3_XXS")  # llama.cpp refuses them without an importance matrix


class Quantize(Section):
    """llama.cpp's names of quantization types, and how many questions the importance matrix is computed from."""

    quant_types: Annotated[list[QuantType], Field(min_length=1)]  # the first is that of models/medical-reasoner.gguf
    imatrix_questions: Annotated[int, Field(ge=0, le=100_000)]  # the first ones of training; 0: no importance matrix

    @model_validator(mode="after")
    def check_fields_together(self) -> Self:
        """Refuse duplicates, and what llama.cpp would refuse after the conversion."""
        if len(set(self.quant_types)) < len(self.quant_types):
            raise ValueError("quant_types must not contain duplicates")
        needing = [name for name in self.quant_types if name in NEED_MATRIX]
        if needing and not self.imatrix_questions:
            raise ValueError(f"{needing[0]} needs an importance matrix; set imatrix_questions to 100, say")
        return self


def texts(questions: int, training: Sequence[Example]) -> list[list[int]]:
    """Token ids of the first `questions`, for the importance matrix; raises `Fail` if there are not as many."""
    if questions > len(training):
        raise Fail(
            f"params.yaml: quantize.imatrix_questions is {questions}, and there are {len(training)} training "
            "questions; lower it, then run `dvc repro`"
        )
    return [row.input_ids for row in training[:questions]]
