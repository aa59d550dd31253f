"""Train: examples and a base -> a LoRA adapter, by QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

The base's linear layers are quantized to NF4 and frozen; rank-r updates (Hu et al. 2021,
https://arxiv.org/abs/2106.09685) are trained with TRL's SFTTrainer. The loss is taken on the answer's tokens only.
A killed run continues from its last checkpoint in .checkpoints/<key> and ends with the same adapter.
"""

import gc
import json
import logging
import math
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.files import read_rows, sha256
from pipeline.core.outputs import remove, write_csv, write_json, writing
from pipeline.core.params import load_params
from pipeline.core.resume import CHECKPOINTS, installed, run_key
from pipeline.core.usage import Usage
from pipeline.models.base_weights import weights_directory
from pipeline.models.manifest import ADAPTER, IDENTITY, Identity, Manifest, read_manifest
from pipeline.models.training import Training
from pipeline.sections.train import Train

COMPLETE = "complete.json"  # in a checkpoint, written last: file name -> sha256
EXTRAS = ["train", "unsloth"]  # of pyproject.toml
SAVE_STEPS = 20  # from one checkpoint to the next: what a kill can cost; SAVE_STEPS in the environment overrides it


def save_steps() -> int:
    """Steps between checkpoints. An environment variable, because it changes no result."""
    value = os.environ.get("SAVE_STEPS", str(SAVE_STEPS))
    if not value.isascii() or not value.isdecimal() or not 0 < int(value) < 2**31:
        raise Fail("the environment variable SAVE_STEPS must be a whole number above 0; set it to one, or unset it")
    return int(value)


def check_backend(params: Train) -> None:
    """Raise `Fail` if the backend cannot run here; imports Unsloth if it is chosen.

    Unsloth replaces functions of transformers, TRL and PEFT, so it has to be imported before they are.
    """
    if params.backend == "trl":
        return

    import torch

    if not torch.cuda.is_available():
        raise Fail("params.yaml: train.backend: unsloth needs a CUDA card, and torch finds none; set it to trl")
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    # Unsloth writes generated code into the working directory unless it is given another place.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache" / "medical-reasoner" / "unsloth"))
    try:
        import unsloth  # noqa: F401  # pyright: ignore
    except ModuleNotFoundError as error:
        raise Fail(
            f"params.yaml: train.backend: the installation of unsloth is incomplete (no module {error.name}); "
            "run `make setup GPU=1`, or set it to trl"
        ) from None


def quantized_lora(params: Train, directory: Path) -> tuple[Any, Any]:
    """The 4-bit base with new LoRA matrices, and its tokenizer, by the chosen backend."""
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
    params: Train, directory: Path, dtype: Any, quantization: Any, lora: dict[str, Any]
) -> tuple[Any, Any]:
    """As `quantized_lora`, with Unsloth's kernels and its gradient checkpoints in main memory."""
    from unsloth import FastLanguageModel  # pyright: ignore

    unsloth: Any = FastLanguageModel
    checkpointing = "unsloth" if params.gradient_checkpointing else False
    model, tokenizer = unsloth.from_pretrained(
        str(directory.absolute()),  # a relative path would be taken for a repository of the hub
        max_seq_length=params.max_length,
        dtype=dtype,
        quantization_config=quantization,
        use_gradient_checkpointing=checkpointing,
        offload_embedding=params.offload_embedding,
        random_state=params.seed,
        trust_remote_code=False,
        local_files_only=True,
    )
    check_modules(model, params.target_modules)
    return unsloth.get_peft_model(
        model, **lora, use_gradient_checkpointing=checkpointing, random_state=params.seed
    ), tokenizer


def trl_lora(params: Train, directory: Path, dtype: Any, quantization: Any, lora: dict[str, Any]) -> tuple[Any, Any]:
    """As `quantized_lora`, with transformers and PEFT: on any CUDA card, and on a CPU."""
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
    check_modules(model, params.target_modules)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=params.gradient_checkpointing)
    config = LoraConfig(**lora, task_type="CAUSAL_LM")
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def check_modules(model: Any, names: list[str]) -> None:
    """Raise `Fail` unless every name is the end of a linear layer's: PEFT only demands that one of them is."""
    import torch

    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if wrong := [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        known = sorted({layer.rpartition(".")[2] for layer in layers} - {"lm_head"})
        raise Fail(
            f"params.yaml: train.target_modules: the base has no linear layer {', '.join(wrong)}; it has "
            f"{', '.join(known)}"
        )


def check_lengths(rows: list[Example], max_length: int) -> None:
    """Raise `Fail` if an example has more than `max_length` tokens: truncation would cut the answer off."""
    if long := [(len(row.input_ids), row.pmid) for row in rows if len(row.input_ids) > max_length]:
        length, pmid = max(long)
        raise Fail(
            f"params.yaml: train.max_length: {len(long)} examples have more than {max_length} tokens "
            f"(the longest {length}, PMID {pmid}); raise it to {length}"
        )


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


def step_recorder() -> Any:
    """A transformers callback that adds time and memory to each step's row of the log, which a checkpoint holds.

    It stops at the first loss that is not finite. `skipped` counts the steps that float16's loss scaling leaves out:
    the first few, while it searches for its scale.
    """
    from transformers import TrainerCallback

    class StepRecorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.at = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before, self.at = self.at, time.perf_counter()
            row = state.log_history[-1]
            if "loss" in row:
                check_loss(row["loss"], f"step {state.global_step}")
            rss, allocated, reserved = memory()
            row |= {
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


def check_loss(loss: float, where: str) -> None:
    """Raise `Fail` if a loss is not finite: later steps cannot repair the adapter."""
    if not math.isfinite(loss):
        raise Fail(f"the loss at {where} is {loss}; lower train.learning_rate in params.yaml, then run `dvc repro`")


def digests(checkpoint: Path) -> dict[str, str]:
    """File name -> sha256 of what the trainer wrote into a checkpoint."""
    return {path.name: sha256(path) for path in checkpoint.iterdir() if path.name != COMPLETE}


def device() -> str:
    """The kind of device that trains: it determines the last bits of the result."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`; removes newer ones that are truncated or altered."""
    for path in sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            if json.loads((path / COMPLETE).read_bytes()) == digests(path):
                return path
        except (ValueError, OSError):
            pass
        remove(path)
    return None


@contextmanager
def memory_errors() -> Generator[None]:
    """Turn running out of memory, on the card or on the host, into a sentence that names what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # A CPU tensor that finds no memory raises a plain RuntimeError.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise Fail(
            "out of memory: in params.yaml lower train.per_device_train_batch_size (and raise "
            "train.gradient_accumulation_steps as much), set train.gradient_checkpointing to true, or lower train.r"
        ) from None


def columns(row: Example) -> dict[str, list[int]]:
    """A row of the trainer's data set: token ids, and 1 for each token of the answer."""
    answer = len(row.input_ids) - row.prompt_tokens
    return {"input_ids": row.input_ids, "completion_mask": [0] * row.prompt_tokens + [1] * answer}


def build_trainer(
    params: Train, model: Any, tokenizer: Any, train: list[Example], validation: list[Example], work: Path
) -> Any:
    """TRL's SFTTrainer over token ids that `format` made; the loss is on the answer alone."""
    import torch
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = SFTConfig(
        output_dir=str(work),
        seed=params.seed,
        data_seed=params.seed,
        max_length=None,
        completion_only_loss=True,
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
        save_steps=save_steps(),
        save_total_limit=2,  # the older one is removed when the newer one is written, before that is known complete
        report_to="none",
    )
    trainer: Any = SFTTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([columns(row) for row in train]),
        eval_dataset=Dataset.from_list([columns(row) for row in validation]),
    )
    # TRL casts the adapter of a 4-bit base to bfloat16: GradScaler fails on it, and a resumed run would differ.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def throughput(steps: list[dict[str, Any]], warm_up: int) -> float:
    """Tokens a second, prompts included and padding not, over the steps after the first `warm_up` + 1."""
    first = min(warm_up, len(steps) - 1)
    seconds = sum(row["seconds"] for row in steps[first + 1 :])
    tokens = steps[-1]["num_input_tokens_seen"] - steps[first]["num_input_tokens_seen"]
    return tokens / seconds if seconds else 0.0


def adapted_modules(adapter: Path) -> list[str]:
    """The names of the layers that have LoRA matrices in a saved adapter, such as q_proj; sorted."""
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER, "np") as tensors:
        return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors.keys()})  # noqa: SIM118


def save_adapter(model: Any, directory: Path, manifest: Manifest) -> None:
    """PEFT's two files and the base's identity; nothing in them names this machine or differs from run to run."""
    model.save_pretrained(directory, save_embedding_layers=False)  # otherwise PEFT asks the hub about them
    (directory / "README.md").unlink(missing_ok=True)
    config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # PEFT saves a set, in another order every time
    config["base_model_name_or_path"] = manifest.name
    write_json(directory / "adapter_config.json", config)
    identity = Identity(adapter=sha256(directory / ADAPTER), files=manifest.files)
    write_json(directory / IDENTITY, identity.model_dump())


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
    """Write ADAPTER; METRICS, LOG (loss, learning rate, gradient norm) and MEMORY_LOG, a row a step; RESOURCES."""
    params = load_params("train", Train)
    check_backend(params)
    training, held_out = read_rows(train, Example), read_rows(validation, Example)
    check_lengths(training + held_out, params.max_length)
    usage = Usage()
    manifest, directory = read_manifest(base), weights_directory(base)
    # Without its package `kernels`, which fetches code from a hub, bitsandbytes warns and uses its own CPU code.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    work = CHECKPOINTS / run_key(params.model_dump(), [train, validation, *sorted(base.iterdir())], EXTRAS, device())

    from transformers import set_seed

    set_seed(params.seed)  # before LoRA's A is drawn: TrainingArguments' own seed is set too late for it
    with memory_errors():
        model, tokenizer = quantized_lora(params, directory)
        trainer = build_trainer(params, model, tokenizer, training, held_out, work)
        trainer.add_callback(step_recorder())
        checkpoint = last_checkpoint(work)
        reset_peak_memory()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        validation_loss = trainer.evaluate()["eval_loss"]
    check_loss(validation_loss, "validation")
    history = [row for row in trainer.state.log_history if "loss" in row]
    with writing(adapter) as partial:
        save_adapter(model, partial, manifest)
        facts = Training(
            params=params,
            modules=adapted_modules(partial),
            packages=installed(EXTRAS),
            training_examples=len(training),
            validation_examples=len(held_out),
        )
        write_json(partial / "training.json", facts.model_dump())
    names = ["step", "loss", "learning_rate", "grad_norm"]
    write_csv(log, names, ([row[name] for name in names] for row in history))
    names = ["step", "rss_mib", "vram_allocated_mib", "vram_reserved_mib"]
    write_csv(memory_log, names, ([row[name] for name in names] for row in history))
    losses = {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"], "validation_loss": validation_loss}
    write_json(metrics, {**losses, "skipped_steps": sum(row["skipped"] for row in history)})
    _, allocated, reserved = memory()
    figures = {
        **usage.figures(),
        "resumed_after_step": int(checkpoint.name.split("-")[1]) if checkpoint else 0,
        "peak_vram_allocated_mib": max(allocated, *(row["vram_allocated_mib"] for row in history)),
        "peak_vram_reserved_mib": max(reserved, *(row["vram_reserved_mib"] for row in history)),
        "tokens_per_second": round(throughput(history, params.warmup_steps), 1),
    }
    write_json(resources, figures)
    for path in CHECKPOINTS.glob("*/"):  # also those of other keys: few are kept, and none after a success
        remove(path)
    with suppress(OSError):  # the journal of a killed evaluation may be there
        CHECKPOINTS.rmdir()
