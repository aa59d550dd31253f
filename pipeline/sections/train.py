"""Section `train`: names and meanings of transformers' TrainingArguments, PEFT's LoraConfig, BitsAndBytesConfig."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.core.params import Section

Positive = Annotated[int, Field(gt=0, lt=2**31)]


def layer_names(names: list[str]) -> list[str]:
    """Require names of linear layers inside the transformer blocks, each once."""
    if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name)]:
        raise ValueError(f"{wrong[0]!r} is not a layer's name, such as q_proj")
    if wrong := [name for name in names if name.rpartition(".")[2] in ("lm_head", "embed_tokens")]:
        raise ValueError(f"{wrong[0]} cannot be merged; name linear layers of the transformer blocks")
    if len(set(names)) < len(names):
        raise ValueError("must not contain duplicates")
    return names


class Train(Section):
    """How the adapter is trained."""

    section: ClassVar[str] = "train"

    backend: Literal["trl", "unsloth"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # numpy's bounds
    r: Annotated[int, Field(gt=0, le=1024)]
    lora_alpha: Annotated[int, Field(gt=0, le=100_000)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[list[str], Field(min_length=1), AfterValidator(layer_names)]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    dtype: Literal["float32", "bfloat16", "float16"]  # of the computation
    max_length: Positive  # tokens; a longer example is refused, never truncated
    max_steps: Positive
    eval_steps: Positive  # between two measurements of the validation loss; one more is after the last step
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    gradient_checkpointing: bool
    offload_embedding: bool  # Unsloth only: keeps the embedding in main memory, which saves 1 GiB of VRAM
    decision_weight: Annotated[float, Field(gt=0, le=1000)]  # of an answer's first token in the loss; 1: as all others
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)]
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]

    @model_validator(mode="after")
    def check_fields_together(self) -> Self:
        """Refuse combinations that the trainer would ignore or reject."""
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed max_steps ({self.max_steps})")
        if self.offload_embedding and self.backend != "unsloth":
            raise ValueError("offload_embedding needs the backend unsloth; set it to false")
        return self
