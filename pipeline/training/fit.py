"""One training, from examples and a base to a LoRA adapter, and what is recorded of it.

QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): the base's linear layers are quantized to NF4 and
frozen; rank-r updates (Hu et al. 2021, https://arxiv.org/abs/2106.09685) are trained with TRL's SFTTrainer. The loss is
taken on the answer's tokens only. A killed run continues from its last checkpoint in .checkpoints/<key> and ends with
the same adapter.
"""

import logging
import os
import sys
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.files import iterate_rows, read_as
from pipeline.core.outputs import remove, write_csv, write_json, writing
from pipeline.core.resume import CHECKPOINTS, installed, run_key
from pipeline.core.usage import Usage
from pipeline.models.base_weights import weights_directory
from pipeline.models.manifest import read_manifest
from pipeline.models.training import Training
from pipeline.sections.train import Train
from pipeline.training.checkpoints import last_checkpoint, save_steps
from pipeline.training.lora import (
    adapted_modules,
    check_backend,
    check_start,
    load_adapter,
    quantized_lora,
    save_adapter,
)
from pipeline.training.processes import asked_for, check_cards, launch, processes, rank
from pipeline.training.trainer import (
    build_trainer,
    check_loss,
    memory,
    memory_errors,
    reset_peak_memory,
    step_recorder,
    throughput,
    validation_loss,
)

EXTRAS = ["train", "unsloth"]  # of pyproject.toml
LOG = ["step", "loss", "validation_loss", "learning_rate", "grad_norm"]
MEMORY_LOG = ["step", "rss_mib", "vram_allocated_mib", "vram_reserved_mib"]


def check_lengths(rows: Iterable[Example], params: Train) -> int:
    """The number of examples; raises `Fail` if one is longer than `max_length`: truncation would cut the answer off."""
    count, long, longest = 0, 0, (0, "")
    for row in rows:  # one at a time: of PQA-A there are 200,000
        count += 1
        long += len(row.input_ids) > params.max_length
        longest = max(longest, (len(row.input_ids), row.pmid))
    if long:
        length, pmid = longest
        raise Fail(
            f"params.yaml: {params.section}.max_length: {long} examples have more than {params.max_length} tokens "
            f"(the longest {length}, PMID {pmid}); raise it to {length}"
        )
    return count


def device() -> str:
    """The kind of device that trains, and how many together: they determine the last bits of the result."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return f"{processes()} x {kind}" if processes() > 1 else kind


def fit(
    params: Train,
    start: Path | None,
    train: Path,
    validation: Path,
    base: Path,
    adapter: Path,
    metrics: Path,
    log: Path,
    memory_log: Path,
    resources: Path,
) -> None:
    """Write ADAPTER, trained from the one in `start` if there is one; METRICS, LOG, MEMORY_LOG and RESOURCES.

    With GPUS in the environment, that many processes do, started after everything has been checked here.
    """
    cards, _ = asked_for(), save_steps()  # a wrong environment variable is refused before anything is loaded
    if processes() == 1 and cards > 1:
        check_cards(params, cards)
    check_backend(params)
    if start:
        check_start(start, params)
    counts = [check_lengths(iterate_rows(path, Example), params) for path in (train, validation)]
    usage = Usage()
    manifest, directory = read_manifest(base), weights_directory(base, verify=processes() == 1)
    if processes() == 1 and cards > 1:
        return launch(cards)
    # Without its package `kernels`, which fetches code from a hub, bitsandbytes warns and uses its own CPU code.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    inputs = [train, validation, *sorted(base.iterdir()), *(sorted(start.iterdir()) if start else [])]
    work = CHECKPOINTS / run_key(params.model_dump(), inputs, EXTRAS, device())

    from transformers import set_seed

    set_seed(params.seed)  # before LoRA's A is drawn: TrainingArguments' own seed is set too late for it
    with memory_errors(params.section):
        model, tokenizer = quantized_lora(params, directory)
        training, held_out = (iterate_rows(path, Example) for path in (train, validation))
        trainer = build_trainer(params, model, tokenizer, training, held_out, work)
        if start:  # now: building the trainer rounds to bfloat16
            load_adapter(model, start)
        # A reference would keep the trainer until the process ends, and print its progress bar after an error's line.
        trainer.add_callback(step_recorder(params, weakref.proxy(trainer)))
        with trainer.accelerator.main_process_first():  # which removes what is incomplete
            checkpoint = last_checkpoint(work)
        reset_peak_memory()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        final_loss = validation_loss(trainer)
        trainer.accelerator.end_training()
    check_loss(final_loss, "validation", params.section)
    if rank() > 0:
        # Without destructors: that of torch's process group may wait for a thread that waits for the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    history = [row for row in trainer.state.log_history if "loss" in row]
    history[-1]["validation_loss"] = final_loss
    with writing(adapter) as partial:
        save_adapter(model, partial, manifest)
        facts = Training(
            params=params,
            modules=adapted_modules(partial),
            packages=installed(EXTRAS),
            training_examples=counts[0],
            validation_examples=counts[1],
            pretraining=read_as(Training, start / "training.json") if start else None,
        )
        write_json(partial / "training.json", facts.model_dump())
    write_csv(log, LOG, ([row.get(name, "") for name in LOG] for row in history))
    write_csv(memory_log, MEMORY_LOG, ([row[name] for name in MEMORY_LOG] for row in history))
    losses = {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"], "validation_loss": final_loss}
    write_json(metrics, {**losses, "skipped_steps": sum(row["skipped"] for row in history)})
    _, allocated, reserved = memory()
    figures = {
        **usage.figures(),
        "processes": processes(),  # a card each; memory is the first one's
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
