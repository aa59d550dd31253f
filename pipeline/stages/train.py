"""Train: formatted examples and a base -> a LoRA adapter, by QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

The base's linear layers are quantized to NF4 and frozen; rank-r updates (Hu et al. 2021,
https://arxiv.org/abs/2106.09685) are trained with TRL's SFTTrainer, the loss taken on the assistant's turn alone.
A run that was killed goes on from its last checkpoint in .checkpoints/<key> and ends as if it had not been.
"""

import gc
import math
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.records import CHECKPOINTS, read_examples, read_json, run_key, sha256, write_csv, write_json
from pipeline.core.stage import Fail, Section, Usage, remove, run, writing
from pipeline.models.weights import ADAPTER, IDENTITY, load_directory, read_manifest

Positive = Annotated[int, Field(gt=0)]
COMPLETE = "complete.json"  # in a checkpoint, written last: file -> sha256


class Params(Section):
    """Names and meanings are those of transformers' TrainingArguments, PEFT's LoraConfig and BitsAndBytesConfig."""

    backend: Literal["trl", "unsloth"]
    seed: int
    r: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    dtype: Literal["float32", "bfloat16", "float16"]  # of the computation
    max_length: Positive  # tokens; a longer example is refused, never cut
    max_steps: Positive
    save_steps: Positive  # from one checkpoint to the next: what a kill can cost
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    gradient_checkpointing: bool
    offload_embedding: bool  # Unsloth's: the embedding waits in main memory, a gigabyte of VRAM for some speed
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]


def check_backend(params: Params) -> None:
    """Raise `Fail` if the backend cannot run here, or cannot do what it is asked for; imports Unsloth if that is it.

    Unsloth replaces functions of transformers, TRL and PEFT, so it has to be imported before they are.
    """
    if params.backend == "trl":
        if params.offload_embedding:
            raise Fail("params.yaml: train.offload_embedding: only train.backend unsloth can do that; set it to false")
        return

    import torch

    if not torch.cuda.is_available():
        raise Fail("params.yaml: train.backend: unsloth needs a CUDA card, and torch finds none; set it to trl")
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    # The code that it generates: left to itself, Unsloth writes it into this directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache" / "medical-reasoner" / "unsloth"))
    try:
        import unsloth  # noqa: F401  # pyright: ignore
    except ModuleNotFoundError as error:
        raise Fail(
            f"params.yaml: train.backend: unsloth is not installed whole (no module {error.name}); "
            "run `make setup GPU=1`, or set it to trl"
        ) from None


def quantized_lora(params: Params, directory: Path) -> tuple[Any, Any]:
    """The base in 4 bit with fresh LoRA matrices, and its tokenizer: the seam between backends."""
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, params.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=params.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=params.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    lora = {
        "r": params.r,
        "lora_alpha": params.lora_alpha,
        "lora_dropout": params.lora_dropout,
        "target_modules": params.target_modules,
    }
    build = unsloth_lora if params.backend == "unsloth" else trl_lora
    return build(params, directory, dtype, quantization, lora)


def unsloth_lora(
    params: Params, directory: Path, dtype: Any, quantization: Any, lora: dict[str, Any]
) -> tuple[Any, Any]:
    """As `quantized_lora`, with Unsloth's kernels and its checkpoints, which wait in main memory."""
    from unsloth import FastLanguageModel  # pyright: ignore

    unsloth: Any = FastLanguageModel
    checkpointing = "unsloth" if params.gradient_checkpointing else False
    model, tokenizer = unsloth.from_pretrained(
        str(directory.absolute()),  # it takes models/base for a repository of the hub, and asks for that
        max_seq_length=params.max_length,
        dtype=dtype,
        quantization_config=quantization,
        use_gradient_checkpointing=checkpointing,
        offload_embedding=params.offload_embedding,
        random_state=params.seed,
        trust_remote_code=False,
        local_files_only=True,
    )
    return unsloth.get_peft_model(
        model, **lora, use_gradient_checkpointing=checkpointing, random_state=params.seed
    ), tokenizer


def trl_lora(params: Params, directory: Path, dtype: Any, quantization: Any, lora: dict[str, Any]) -> tuple[Any, Any]:
    """As `quantized_lora`, with transformers and PEFT alone: on any CUDA card, and on a CPU."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": 0} if torch.cuda.is_available() else "cpu",
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=quantization,
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=params.gradient_checkpointing)
    config = LoraConfig(**lora, task_type="CAUSAL_LM")
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def check_lengths(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> None:
    """Raise `Fail` if an example has more than `max_length` tokens: cutting it would cut the answer off."""
    chats = [row["prompt"] + row["completion"] for row in rows]
    lengths = [len(ids) for ids in tokenizer.apply_chat_template(chats, return_dict=False)]
    pmids = [row["pmid"] for row in rows]
    if long := [(length, pmid) for length, pmid in zip(lengths, pmids, strict=True) if length > max_length]:
        length, pmid = max(long)
        raise Fail(
            f"params.yaml: train.max_length: {len(long)} examples have more than {max_length} tokens "
            f"(the longest {length}, PMID {pmid}); raise it to {length}"
        )


def memory() -> tuple[float, float, float]:
    """Resident memory of this process now, and the peak of allocated and of reserved VRAM so far, in MiB."""
    import psutil
    import torch

    vram = (
        (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else (0, 0)
    )
    rss, allocated, reserved = (round(size / 2**20, 1) for size in (psutil.Process().memory_info().rss, *vram))
    return rss, allocated, reserved


def forget_loading() -> None:
    """Let the peaks of VRAM begin with the training: loading leaves room behind that no step needs."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_recorder() -> Any:
    """A transformers callback that adds `figures` to each step's row of the log, which a checkpoint holds.

    `skipped` counts the steps that float16's loss scaling left out: the first few, while it looks for its scale.
    """
    from transformers import TrainerCallback

    class StepRecorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.at = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before, self.at = self.at, time.perf_counter()
            rss, allocated, reserved = memory()
            state.log_history[-1] |= {
                "seconds": self.at - before,
                "rss_mib": rss,
                "vram_allocated_mib": allocated,
                "vram_reserved_mib": reserved,
                "skipped": bool(getattr(kwargs["optimizer"], "step_was_skipped", False)),  # accelerate's
            }

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_save = False  # a trainer that resumes from the last step takes one step more

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / COMPLETE, digests(checkpoint))

    return StepRecorder()


def digests(checkpoint: Path) -> dict[str, str]:
    """File name -> sha256 of what the trainer wrote into a checkpoint."""
    return {path.name: sha256(path) for path in checkpoint.iterdir() if path.name != COMPLETE}


def device() -> str:
    """The kind of device that trains: it decides the result's last bits."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint in `directory` that is whole; removes any newer one, which a kill or a hand has altered."""
    for path in sorted(directory.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name), reverse=True):
        try:
            if read_json(path / COMPLETE) == digests(path):
                return path
        except (Fail, OSError):
            pass
        remove(path)
    return None


@contextmanager
def memory_errors() -> Generator[None]:
    """Turn running out of memory, on the card or beside it, into a sentence that names what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # A CPU tensor that finds no memory is a bare RuntimeError.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise Fail(
            "out of memory: in params.yaml lower train.per_device_train_batch_size (and raise "
            "train.gradient_accumulation_steps as much), set train.gradient_checkpointing to true, or lower train.r"
        ) from None


def build_trainer(params: Params, model: Any, tokenizer: Any, rows: dict[str, list[dict[str, Any]]], work: Path) -> Any:
    """TRL's SFTTrainer over prompt/completion rows; TRL masks the prompt, so that only the answer is learnt."""
    import torch
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    def dataset(split: str) -> Any:
        return Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows[split]])

    config = SFTConfig(
        output_dir=str(work),
        seed=params.seed,
        data_seed=params.seed,
        max_length=None,
        max_steps=params.max_steps,
        per_device_train_batch_size=params.per_device_train_batch_size,
        per_device_eval_batch_size=params.per_device_train_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        gradient_checkpointing=params.gradient_checkpointing,
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_steps,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim=params.optim,
        bf16=params.dtype == "bfloat16",
        fp16=params.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=params.save_steps,
        save_total_limit=2,  # the older goes once the newer is written, but before that is known to be whole
        report_to="none",
    )
    trainer: Any = SFTTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=dataset("train"),
        eval_dataset=dataset("validation"),
    )
    # TRL casts the adapter of a 4-bit base to bfloat16: GradScaler fails on it, and a resumed run would differ.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def check_losses(losses: list[float]) -> None:
    """Raise `Fail` at the first loss, a step's or in the end validation's, that is no number."""
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            raise Fail(f"the loss is {loss} after step {min(step, len(losses) - 1)}; lower train.learning_rate")


def throughput(steps: list[dict[str, Any]], warm_up: int) -> float:
    """Tokens a second, prompt included and padding not, over the steps after the first and `warm_up` more."""
    first = min(warm_up, len(steps) - 1)
    seconds = sum(row["seconds"] for row in steps[first + 1 :])
    tokens = steps[-1]["num_input_tokens_seen"] - steps[first]["num_input_tokens_seen"]
    return tokens / seconds if seconds else 0.0


def save_adapter(model: Any, directory: Path, manifest: dict[str, Any]) -> None:
    """PEFT's two files and the base's identity, with nothing in them that names this machine or changes run by run."""
    model.save_pretrained(directory, save_embedding_layers=False)  # left to itself, PEFT asks the hub about them
    (directory / "README.md").unlink(missing_ok=True)
    config = read_json(directory / "adapter_config.json")
    config["target_modules"] = sorted(config["target_modules"])  # PEFT saves a set, in another order every time
    config["base_model_name_or_path"] = manifest.get("repo_id", manifest["source"])
    write_json(directory / "adapter_config.json", config)
    write_json(directory / IDENTITY, {"adapter": sha256(directory / ADAPTER), "files": manifest["files"]})


def main(
    train: Path,
    validation: Path,
    base: Path,
    adapter: Path,
    metrics: Path,
    log: Path,
    memory_log: Path,
    resources: Path,
) -> None:
    """Write ADAPTER; METRICS, LOG (loss, learning rate, gradient norm) and MEMORY_LOG a row a step; RESOURCES."""
    params = Params.load("train")
    check_backend(params)
    rows = {"train": read_examples(train), "validation": read_examples(validation)}
    usage = Usage()
    manifest = read_manifest(base)
    directory = load_directory(base, manifest)

    work = CHECKPOINTS / run_key(params, [train, validation, *sorted(base.iterdir()), Path(__file__)], device())

    from transformers import set_seed

    set_seed(params.seed)  # before LoRA's A is drawn: TrainingArguments' own seed comes too late for it
    with memory_errors():
        model, tokenizer = quantized_lora(params, directory)
        check_lengths(rows["train"] + rows["validation"], tokenizer, params.max_length)
        trainer = build_trainer(params, model, tokenizer, rows, work)
        trainer.add_callback(step_recorder())
        checkpoint = last_checkpoint(work)
        forget_loading()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        validation_loss = trainer.evaluate()["eval_loss"]
    history = [row for row in trainer.state.log_history if "loss" in row]
    losses = [row["loss"] for row in history]
    check_losses([*losses, validation_loss])
    with writing(adapter) as partial:
        save_adapter(model, partial, manifest)
    columns = ["step", "loss", "learning_rate", "grad_norm"]
    write_csv(log, columns, ([row[name] for name in columns] for row in history))
    columns = ["step", "rss_mib", "vram_allocated_mib", "vram_reserved_mib"]
    write_csv(memory_log, columns, ([row[name] for name in columns] for row in history))
    figures = {"first_loss": losses[0], "last_loss": losses[-1], "validation_loss": validation_loss}
    write_json(metrics, {**figures, "skipped_steps": sum(row["skipped"] for row in history)})
    _, allocated, reserved = memory()
    figures = {
        **usage.figures(),
        "resumed_after_step": int(checkpoint.name.split("-")[1]) if checkpoint else 0,
        "peak_vram_allocated_mib": max(allocated, *(row["vram_allocated_mib"] for row in history)),
        "peak_vram_reserved_mib": max(reserved, *(row["vram_reserved_mib"] for row in history)),
        "tokens_per_second": round(throughput(history, params.warmup_steps), 1),
    }
    write_json(resources, figures)
    for path in CHECKPOINTS.glob("*/"):  # those of other keys too: few are kept, and none after a success
        remove(path)
    with suppress(OSError):  # a killed evaluation's answers may lie there
        CHECKPOINTS.rmdir()


if __name__ == "__main__":
    run(main)
