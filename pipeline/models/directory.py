"""Reading a transformers model directory: its weight files, and its configuration without the weights."""

import shutil
from pathlib import Path

from pipeline.core.errors import Fail
from pipeline.core.json_files import read_json_object
from pipeline.models.manifest import TEMPLATE

# Configuration, tokenizer, chat template and licence; never code.
CONFIGURATION = ["*.json", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY*"]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TINY_BASE = Path(__file__).parent.parent / "simulated" / "tiny_base"


def check_whole(files: list[Path]) -> None:
    """Raise `Fail` naming the first safetensors file that is missing or not as long as its header says."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, "np"):
                pass
        except (OSError, SafetensorError):
            raise Fail(f"{path} is missing, truncated or not a safetensors file; create or download it again") from None


def copy_configuration(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template, but no weights; the template gets a file of its own."""
    target.mkdir(parents=True)
    for pattern in CONFIGURATION:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (target / name).is_file():
            raise Fail(f"{source} has no {name}; base needs a transformers model directory with a fast tokenizer")
    refuse_code(target, source)
    if not (target / TEMPLATE).is_file():  # older models have it in tokenizer_config.json
        template = read_json_object(target / "tokenizer_config.json").get("chat_template")
        if not isinstance(template, str):
            raise Fail(f"{source} has no chat template; base needs an instruct model")
        (target / TEMPLATE).write_text(template, encoding="utf-8")


def refuse_code(directory: Path, source: Path) -> None:
    """Raise `Fail` if a loader would run code, or read other weights than those that `base` examined.

    `source` is the directory's place in errors.
    """
    for file in sorted(directory.glob("*config.json")):
        if "auto_map" in read_json_object(file, str(source / file.name)):
            raise Fail(f"{source / file.name} names code (auto_map), which is never run here; choose another base")
    if (directory / "adapter_config.json").is_file():  # transformers would load the base that it names instead
        raise Fail(
            f"{source} holds an adapter beside a model; move adapter_config.json elsewhere, or choose another base"
        )
    named = read_json_object(directory / INDEX).get("weight_map") if (directory / INDEX).is_file() else SINGLE
    if (directory / SINGLE).is_file() and SINGLE not in str(named):
        raise Fail(
            f"{source} has {SINGLE} beside the shards that {INDEX} names, and programs differ in which they read; "
            "move what is not the model elsewhere"
        )
