"""Everything that must be true of a model directory before it is fine-tuned, examined once.

Without the weights themselves: the headers of the safetensors files are enough for names and shapes.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import Fail
from pipeline.core.json_files import read_json_object
from pipeline.models.chat import first_line, read_template, special_tokens
from pipeline.models.directory import INDEX, SINGLE, check_whole
from pipeline.models.encoder import Encoder

OTHER = "choose another base"
SKIPPED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")  # by llama.cpp's converter
LABELS = ("yes", "no", "maybe", "Yes", "No", "Maybe")


class Tensor(NamedTuple):
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]


def weight_names(directory: Path, present: list[str], source: str) -> list[str]:
    """The safetensors files that are the model: those that the index names, or the single file.

    `present` are the safetensors files at the top level of `source`. transformers and llama.cpp's converter choose
    differently among others, so an ambiguity raises `Fail`.
    """
    models = [name for name in present if name.startswith("model")]
    if not (directory / INDEX).is_file():
        if models == [SINGLE]:
            return models
        found = ", ".join(present) or "none"
        raise Fail(
            f"{source} needs one file {SINGLE}, or shards with {INDEX}; its safetensors files are: {found}. Pickle "
            f"weights are not read: convert them with transformers' save_pretrained, or {OTHER}"
        )
    index = read_json_object(directory / INDEX, f"{source}/{INDEX}")
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise Fail(f"{source}/{INDEX} has no weight_map; {OTHER}")
    shards = sorted(set(named.values()))
    if odd := [name for name in shards if not re.fullmatch(r"model[\w.-]*\.safetensors", name, re.ASCII)]:
        raise Fail(f"{source}/{INDEX} names {', '.join(odd)}; shards are model*.safetensors beside it, so {OTHER}")
    if missing := [name for name in shards if name not in present]:
        raise Fail(f"{source} lacks {', '.join(missing)}, which {INDEX} names; download it again, or {OTHER}")
    if extra := [name for name in models if name not in shards]:
        raise Fail(
            f"{source} has {', '.join(extra)} beside the shards that {INDEX} names, and programs differ in which they "
            f"read; move the files that are not the model elsewhere, then run `dvc repro`, or {OTHER}"
        )
    return shards


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file; raises `Fail` if it is not complete."""
    check_whole([path])
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: Tensor(about["dtype"], tuple(about["shape"])) for name, about in header.items() if name != "__metadata__"
    }


def check_tensors(directory: Path, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `Fail` unless the tensors are those of the configuration, all of them and of the right shapes."""
    check_configuration(directory, source)
    if not all(tensor.dtype in ("F16", "BF16", "F32") for tensor in tensors.values()):
        kinds = sorted({tensor.dtype for tensor in tensors.values()} - {"F16", "BF16", "F32"})
        raise Fail(f"{source} has weights of type {', '.join(kinds)}; QLoRA starts from 16 or 32 bits, so {OTHER}")
    model = empty_model(directory, source)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)  # with this configuration: `_tied_weights_keys` names what could be tied
    ignored = "|".join(map(str, model._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    found: list[str] = []
    for name, shape in expected.items():
        if name not in tensors and name not in tied:
            found.append(f"{name} is missing")
        elif name in tensors and tensors[name].shape != shape:
            found.append(f"{name} is {tensors[name].shape}, config.json says {shape}")
    found += [
        f"{name} is in no layer"
        for name in sorted(tensors.keys() - expected.keys())
        if not name.endswith(SKIPPED) and not re.search(ignored, name)
    ]
    if (directory / INDEX).is_file():
        named = read_json_object(directory / INDEX)["weight_map"].keys()
        found += [f"{name} is not both in {INDEX} and in the shards" for name in sorted(named ^ tensors.keys())]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise Fail(f"{source}: weights and config.json disagree: {'; '.join(found[:5])}{more}; {OTHER}")


def empty_model(directory: Path, source: str) -> Any:
    """The model of the configuration, without memory for its weights; raises `Fail`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for configurations that it does not know
        reason = first_line(error)
        raise Fail(
            f"{source}: transformers cannot build a causal language model of config.json ({reason}); {OTHER}"
        ) from None


def check_configuration(directory: Path, source: str) -> None:
    """Raise `Fail` listing what in the configuration a fine-tuning cannot start from."""
    config = read_json_object(directory / "config.json", f"{source}/config.json")
    found: list[str] = []
    if config.get("quantization_config"):
        found.append("config.json has a quantization_config: quantized weights cannot be merged with an adapter")
    tokenizer = Encoder(directory).tokenizer
    last = max(tokenizer.get_vocab().values(), default=-1)
    text_config = config.get("text_config")
    vocab_size = config.get("vocab_size", text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    if not isinstance(vocab_size, int):
        found.append("config.json has no vocab_size")
    else:
        named = [*special_ids(directory), (f"the tokenizer's id of {tokenizer.id_to_token(last)!r}", last)]
        tokens = special_tokens(read_json_object(directory / "tokenizer_config.json"))
        lost = [token for token in tokens.items() if tokenizer.token_to_id(token[1]) is None]
        # transformers adds such tokens at the end
        named += [(f"{name} {text!r}, which tokenizer.json lacks,", last + i) for i, (name, text) in enumerate(lost, 1)]
        found += [
            f"{name} is {value}, outside the vocabulary of {vocab_size}"
            for name, value in named
            if not 0 <= value < vocab_size
        ]
    if found:
        raise Fail(f"{source}: {'; '.join(found)}; {OTHER}")


def special_ids(directory: Path) -> list[tuple[str, int]]:
    """Name and value of every token id that the configuration names."""
    found: list[tuple[str, int]] = []
    for file in ("config.json", "generation_config.json"):
        values = read_json_object(directory / file) if (directory / file).is_file() else {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = values.get(name)
            listed = value if isinstance(value, list) else [value]
            found += [(f"{file}'s {name}", item) for item in listed if isinstance(item, int)]
    return found


def check_prompt(directory: Path) -> None:
    """Raise `Fail` unless training, scoring and generation agree in the base's chat template and tokenizer."""
    template, encoder = read_template(directory), Encoder(directory)
    chat = template.render([{"role": "user", "content": "Is it so?"}], "Yes. It is.")
    whole, prompt = encoder.example(chat)
    beginning = whole[:prompt]
    for form in LABELS:
        together = encoder.ids(chat.prompt + form)
        if together[:prompt] != beginning or len(together) == prompt:
            raise Fail(f"the tokenizer joins {form!r} with the end of the prompt, so it cannot be scored; {OTHER}")
