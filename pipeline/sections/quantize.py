"""Section `quantize`: the type of the GGUF file that ships."""

from typing import Literal

from pipeline.core.params import Section


class Quantize(Section):
    """llama.cpp's name of a quantization type."""

    quant_type: Literal["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "Q8_0", "Q3_K_M", "IQ4_XS"]
