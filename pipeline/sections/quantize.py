"""Section `quantize`: the type of the GGUF file that ships."""

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
    """llama.cpp's name of a quantization type, and how many questions its importance matrix is computed from."""

    quant_type: QuantType
    imatrix_questions: Annotated[int, Field(ge=0, le=100_000)]  # the first ones of training; 0: no importance matrix

    @model_validator(mode="after")
    def check_fields_together(self) -> Self:
        """Refuse what llama.cpp would refuse after the conversion."""
        if self.quant_type in NEED_MATRIX and not self.imatrix_questions:
            raise ValueError(f"{self.quant_type} needs an importance matrix; set imatrix_questions to 100, say")
        return self

    def texts(self, training: Sequence[Example]) -> list[list[int]]:
        """Token ids of the questions for the importance matrix; raises `Fail` if there are not as many."""
        if self.imatrix_questions > len(training):
            raise Fail(
                f"params.yaml: quantize.imatrix_questions is {self.imatrix_questions}, and there are {len(training)} "
                "training questions; lower it, then run `dvc repro`"
            )
        return [row.input_ids for row in training[: self.imatrix_questions]]
