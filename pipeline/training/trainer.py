"""TRL's SFTTrainer over the token ids that `format` made, and what it records of each step."""

import gc
import math
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.outputs import write_json
from pipeline.sections.train import Train
from pipeline.training.checkpoints import COMPLETE, digests, save_steps
from pipeline.training.lora import CHECKPOINTING
from pipeline.training.processes import processes, rank

# Parameters that TRL takes as they are.
SAME: set[str] = set(
    "seed max_steps per_device_train_batch_size gradient_checkpointing learning_rate lr_scheduler_type warmup_steps "
    "weight_decay max_grad_norm optim".split()
)


def columns(row: Example) -> dict[str, list[int]]:
    """A row of the trainer's data set: token ids, and 1 for each token of the answer."""
    answer = len(row.input_ids) - row.prompt_tokens
    return {"input_ids": row.input_ids, "completion_mask": [0] * row.prompt_tokens + [1] * answer}


def data_set(rows: Iterable[dict[str, list[int]]], path: Path, filled: bool = False) -> Any:
    """A data set in an Arrow file, of which only the rows in use are in memory; `filled` adds one without an answer."""
    from datasets import Dataset, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({"input_ids": Sequence(Value("int32")), "completion_mask": Sequence(Value("int8"))})
    with ArrowWriter(path=str(path), features=features) as writer:
        for row in rows:
            writer.write(row)
        if filled:
            writer.write({"input_ids": [0, 0], "completion_mask": [0, 0]})
        writer.finalize()
    return Dataset.from_file(str(path))


def arguments(params: Train, work: Path) -> Any:
    """TRL's SFTConfig: one card a process, and the examples of a step as in params.yaml whatever their number."""
    import torch
    from trl.trainer.sft_config import SFTConfig

    config = SFTConfig(
        output_dir=str(work),
        **params.model_dump(include=SAME),
        data_seed=params.seed,
        max_length=None,
        completion_only_loss=True,
        per_device_eval_batch_size=params.per_device_train_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps // processes(),
        gradient_checkpointing_kwargs=CHECKPOINTING if params.backend == "trl" else None,
        ddp_find_unused_parameters=False,
        bf16=params.dtype == "bfloat16",
        fp16=params.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=save_steps(),
        save_total_limit=2,  # the older one is removed when the newer one is written, before that is known complete
        report_to="none",
    )
    if config.n_gpu > 1:  # transformers would train under DataParallel: twice the examples a step on two cards
        config._n_gpu = 1  # pyright: ignore[reportPrivateUsage]
    if config.use_cpu:  # with several processes it is cpu:0, to which torch cannot load a checkpoint
        config.__dict__["_setup_devices"] = torch.device("cpu")
    return config


def build_trainer(
    params: Train, model: Any, tokenizer: Any, train: Iterable[Example], validation: Iterable[Example], work: Path
) -> Any:
    """TRL's SFTTrainer over token ids that `format` made; the loss is on the answer alone."""
    from trl.trainer.sft_trainer import SFTTrainer

    trainer: Any = (distributed(SFTTrainer) if processes() > 1 else SFTTrainer)(
        model=model,
        args=arguments(params, work),
        processing_class=tokenizer,
        train_dataset=data_set(map(columns, train), work / f"train-{rank()}.arrow", filled=processes() > 1),
        eval_dataset=data_set(map(columns, validation), work / f"validation-{rank()}.arrow"),
    )
    # TRL casts the adapter of a 4-bit base to bfloat16: GradScaler fails on it, and a resumed run would differ.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def distributed(trainer: Any) -> Any:
    """A trainer of one of several processes, whose steps have the examples of one process's steps.

    Each step's micro-batches are dealt to the processes. accelerate fills an epoch's last ones with examples from its
    beginning; here they are filled with the data set's last row, on which no loss is taken.
    """
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import Sampler

    class Filled(Sampler[int]):
        """One process's order of the examples, and the last row until all processes have equally many batches."""

        def __init__(self, rows: Any, batch: int, seed: int) -> None:
            self.order = SeedableRandomSampler(range(len(rows) - 1), data_seed=seed)
            whole = batch * processes()
            self.fill = [len(rows) - 1] * (-len(self.order) % whole)

        def __len__(self) -> int:
            return len(self.order) + len(self.fill)

        def __iter__(self) -> Any:
            yield from self.order
            yield from self.fill

        def set_epoch(self, epoch: int) -> None:
            self.order.set_epoch(epoch)

    class Distributed(trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Filled(self.train_dataset, self.args.train_batch_size, self.args.data_seed)

    return Distributed


def validation_loss(trainer: Any) -> float:
    """The mean loss over the validation examples, computed by every process.

    Training goes on as if it had not been called: no random number is drawn, and only dropout is switched off, because
    bitsandbytes repacks the weights of a model that is not training for a CPU kernel that has no gradient.
    """
    from torch.nn import Dropout

    rows, size, losses = trainer.eval_dataset, trainer.args.eval_batch_size, list[float]()
    dropouts = [module for module in trainer.model.modules() if isinstance(module, Dropout)]
    for module in dropouts:
        module.eval()
    for start in range(0, len(rows), size):
        batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
        loss, *_ = trainer.prediction_step(trainer.model, trainer.data_collator(batch), prediction_loss_only=True)
        losses += [float(loss)] * len(batch)
    for module in dropouts:
        module.train()
    return sum(losses) / len(losses)


def step_recorder(params: Train, trainer: Any) -> Any:
    """A transformers callback that adds time, memory and, where it is due, the validation loss to a step's row.

    The rows are the trainer's log, which a checkpoint holds. It stops at the first loss that is not finite. `skipped`
    counts the steps that float16's loss scaling leaves out: the first few, while it searches for its scale.
    """
    from transformers import TrainerCallback

    class StepRecorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.at = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before, self.at = self.at, time.perf_counter()
            row = state.log_history[-1]
            if "loss" in row:
                check_loss(row["loss"], f"step {state.global_step}", params.section)
            rss, allocated, reserved = memory()
            row |= {
                "seconds": self.at - before,
                "rss_mib": rss,
                "vram_allocated_mib": allocated,
                "vram_reserved_mib": reserved,
                "skipped": bool(getattr(kwargs["optimizer"], "step_was_skipped", False)),  # accelerate's
            }
            if state.global_step % params.eval_steps == 0 and state.global_step < state.max_steps:
                row["validation_loss"] = validation_loss(trainer)
                check_loss(row["validation_loss"], f"step {state.global_step} (validation)", params.section)
                self.at = time.perf_counter()  # no step's time

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_save = False  # a trainer that resumes from the last step takes one step more

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.distributed_state.wait_for_everyone()  # each process writes its random state
            if not state.is_world_process_zero:
                return
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / COMPLETE, digests(checkpoint))

    return StepRecorder()


def check_loss(loss: float, where: str, section: str) -> None:
    """Raise `Fail` if a loss is not finite: later steps cannot repair the adapter."""
    if not math.isfinite(loss):
        raise Fail(f"the loss at {where} is {loss}; lower {section}.learning_rate in params.yaml, then run `dvc repro`")


def memory() -> tuple[float, float, float]:
    """Resident memory of this process, and the peaks of allocated and of reserved VRAM so far, in MiB."""
    import psutil
    import torch

    vram = (
        (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else (0, 0)
    )
    rss, allocated, reserved = (round(size / 2**20, 1) for size in (psutil.Process().memory_info().rss, *vram))
    return rss, allocated, reserved


def reset_peak_memory() -> None:
    """Start the peaks of VRAM at the training: loading needs memory that no step needs."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def memory_errors(section: str) -> Generator[None]:
    """Turn running out of memory, on the card or on the host, into a sentence that names what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # A CPU tensor that finds no memory raises a plain RuntimeError.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise Fail(
            f"out of memory: in params.yaml lower {section}.per_device_train_batch_size (and raise "
            "gradient_accumulation_steps as much), set gradient_checkpointing to true, or lower r"
        ) from None


def throughput(steps: list[dict[str, Any]], warm_up: int) -> float:
    """Tokens a second, prompts included and padding not, over the steps after the first `warm_up` + 1."""
    first = min(warm_up, len(steps) - 1)
    seconds = sum(row["seconds"] for row in steps[first + 1 :])
    tokens = steps[-1]["num_input_tokens_seen"] - steps[first]["num_input_tokens_seen"]
    return tokens / seconds if seconds else 0.0
