"""The 4-bit base with LoRA matrices, by Unsloth or by transformers and PEFT; and the adapter's files."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from pipeline.core.outputs import write_json
from pipeline.models.manifest import ADAPTER, IDENTITY, Identity, Manifest
from pipeline.sections.train import Train
from pipeline.training.decision import weigh_decision
from pipeline.training.kernels import share_buffer, split_examples
from pipeline.training.processes import rank

CHECKPOINTING = {"use_reentrant": False}  # of gradients, with transformers: DDP needs it


def check_backend(params: Train) -> None:
    """Raise `Fail` if the backend cannot run here; imports Unsloth if it is chosen.

    Unsloth replaces functions of transformers, TRL and PEFT, so it has to be imported before they are.
    """
    if params.backend == "trl":
        return

    import torch

    if not torch.cuda.is_available():
        raise Fail(
            f"params.yaml: {params.section}.backend: unsloth needs a CUDA card, and torch finds none; set it to trl"
        )
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    # Unsloth writes generated code into the working directory unless it is given another place.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache" / "medical-reasoner" / "unsloth"))
    try:
        import unsloth  # noqa: F401  # pyright: ignore
    except ModuleNotFoundError as error:
        raise Fail(
            f"params.yaml: {params.section}.backend: the installation of unsloth is incomplete (no module "
            f"{error.name}); run `make setup GPU=1`, or set it to trl"
        ) from None


def quantized_lora(params: Train, directory: Path) -> tuple[Any, Any]:
    """The 4-bit base with new LoRA matrices, and its tokenizer, by the chosen backend."""
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, params.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        **params.model_dump(include={"bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}),
        bnb_4bit_compute_dtype=dtype,
    )
    lora = params.model_dump(include={"r", "lora_alpha", "lora_dropout", "target_modules"})
    build = unsloth_lora if params.backend == "unsloth" else trl_lora
    model, tokenizer = build(params, directory, dtype, quantization, lora)
    if params.decision_weight != 1:
        weigh_decision(model, params.decision_weight)
    return model, tokenizer


def unsloth_lora(
    params: Train, directory: Path, dtype: Any, quantization: Any, lora: dict[str, Any]
) -> tuple[Any, Any]:
    """As `quantized_lora`, with Unsloth's kernels and its gradient checkpoints in main memory."""
    from unsloth import FastLanguageModel  # pyright: ignore

    share_buffer()
    split_examples()
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
    check_modules(model, params)
    return unsloth.get_peft_model(
        model, **lora, use_gradient_checkpointing=checkpointing, random_state=params.seed
    ), tokenizer


def trl_lora(params: Train, directory: Path, dtype: Any, quantization: Any, lora: dict[str, Any]) -> tuple[Any, Any]:
    """As `quantized_lora`, with transformers and PEFT: on any CUDA card, and on a CPU."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if torch.cuda.is_available():
        torch.cuda.set_device(rank())
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": rank()} if torch.cuda.is_available() else "cpu",  # "auto" would split the model over the cards
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=quantization,
    )
    check_modules(model, params)
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=params.gradient_checkpointing,
        gradient_checkpointing_kwargs=CHECKPOINTING,
    )
    config = LoraConfig(**lora, task_type="CAUSAL_LM")
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def check_modules(model: Any, params: Train) -> None:
    """Raise `Fail` unless every target is the end of a linear layer's: PEFT only demands that one of them is."""
    import torch

    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if wrong := [
        name for name in params.target_modules if not any(f".{layer}".endswith(f".{name}") for layer in layers)
    ]:
        known = sorted({layer.rpartition(".")[2] for layer in layers} - {"lm_head"})
        raise Fail(
            f"params.yaml: {params.section}.target_modules: the base has no linear layer {', '.join(wrong)}; it has "
            f"{', '.join(known)}"
        )


def check_start(start: Path, params: Train) -> None:
    """Raise `Fail` naming every parameter in which the adapter in `start` is not as this phase's."""
    config = json.loads((start / "adapter_config.json").read_text("utf-8"))
    here = {"r": params.r, "lora_alpha": params.lora_alpha, "target_modules": sorted(params.target_modules)}
    if wrong := [f"train.{name} must equal pretrain.{name}" for name in here if here[name] != config[name]]:
        raise Fail(f"params.yaml: {'; '.join(wrong)}: both phases train one adapter; correct it, then run `dvc repro`")


def load_adapter(model: Any, start: Path) -> None:
    """Give the model's LoRA matrices the values of the adapter in `start`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = set_peft_model_state_dict(model, load_file(start / ADAPTER))
    assert not found.unexpected_keys, found.unexpected_keys


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
