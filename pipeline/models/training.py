"""How an adapter was trained: models/adapter/training.json, which the model card quotes."""

from pydantic import BaseModel, ConfigDict

from pipeline.sections.pretrain import Pretrain
from pipeline.sections.train import Train


class Training(BaseModel):
    """Facts of one training run; no times, speeds or memory, which differ from run to run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    params: Pretrain | Train
    modules: list[str]  # names of the layers that have LoRA matrices in the adapter, such as q_proj
    packages: dict[str, str]  # package -> version, of those that can change the result
    training_examples: int
    validation_examples: int
    pretraining: "Training | None" = None  # the phase before this one

    @property
    def examples_per_step(self) -> int:
        """Examples whose gradients make one step of the optimizer."""
        return self.params.per_device_train_batch_size * self.params.gradient_accumulation_steps
