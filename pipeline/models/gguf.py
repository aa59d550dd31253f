"""A transformers model directory -> a quantized GGUF, with llama.cpp's own converter and quantizer.

Both come from the source package that the llama-cpp-python runtime is built from, so that converter, quantizer and
runtime are one commit. The converter imports torch, so it runs in a process of its own:
`python -m pipeline.models.converter`.
"""

import ctypes
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.errors import Fail
from pipeline.core.outputs import scratch
from pipeline.core.process import run_module
from pipeline.models import imatrix
from pipeline.models.manifest import Manifest

# Mean bits of a weight in an 8-billion-parameter Llama 3, by the size of the file, rounded up.
BITS = {
    "IQ3_XXS": 3.4, "IQ3_XS": 3.5, "IQ3_M": 3.8, "Q3_K_M": 4.0, "IQ4_XS": 4.5, "IQ4_NL": 4.7, "Q4_0": 4.7,
    "Q4_K_M": 4.9, "Q5_K_M": 5.8, "Q6_K": 6.6, "Q8_0": 8.6,
}  # fmt: skip
MAX_BUF_SIZE = 1 << 30  # bytes of a tensor's rows that the quantizer holds at once; llama.cpp's default is 8 GiB


def size(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def check_disk(manifest: Manifest, directory: Path, copies: float) -> None:
    """Raise `Fail` unless the disk of `directory` has room for `copies` times the base's weights."""
    needed = copies * sum(file.size for file in manifest.files)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise Fail(
            f"{directory} needs {size(needed)} of free disk for a GGUF and has {size(free)}; free some, then run "
            "`dvc repro`"
        )


def build(
    model: Path,
    manifest: Manifest,
    targets: Mapping[Path, str],
    metadata: dict[str, Any],
    texts: Sequence[Sequence[int]],
) -> imatrix.Matrix:
    """Convert the model directory to a temporary 16-bit GGUF and quantize that to each target, of the type beside it.

    Returns the importance matrix over `texts` of token ids, an empty one if there are none. Raises `Fail`.
    """
    first, *_ = targets
    check_disk(manifest, first.parent, 1 + sum(BITS[quant_type] for quant_type in targets.values()) / 16)
    with scratch(first.with_suffix(".16bit.gguf")) as wide:
        convert(model, manifest, wide, metadata)
        matrix = imatrix.collect(wide, texts) if texts else {}
        for target, quant_type in targets.items():
            quantize(wide, target, quant_type, matrix)
    return matrix


def convert(model: Path, manifest: Manifest, target: Path, metadata: dict[str, Any]) -> None:
    """Write `model` as a GGUF in its own 16-bit type; `metadata` overrides what the converter finds. Raises `Fail`."""
    check_disk(manifest, target.parent, 1)
    options = {"metadata": metadata, "vocab_only": False}
    run_converter(model, target, options, str(model))


def check_convertible(model: Path, source: str) -> None:
    """Raise `Fail` naming `source` if llama.cpp cannot convert a model of this configuration and tokenizer.

    Needs no weights.
    """
    with scratch(model.with_name("vocabulary")) as copy:
        # Where an index of shards is, the converter opens the shards.
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.index.json"))
        options = {"metadata": {}, "vocab_only": True}
        run_converter(copy, copy / "vocabulary.gguf", options, source)


def run_converter(model: Path, target: Path, options: dict[str, Any], source: str) -> None:
    """Run `models.converter`, which also checks the token ids; raises `Fail` naming `source`, with its sentence."""
    command = "pipeline.models.converter", str(model), str(target)
    try:
        run_module(*command, given=json.dumps(options), HF_HUB_OFFLINE="1")
    except Fail as error:
        raise Fail(f"{source}: {error}") from None


def run_quantizer(
    source: Path, target: Path, quant_type: str, matrix: imatrix.Matrix, note: Callable[[str], None], **options: int
) -> int:
    """The status of llama.cpp's quantizer, 0 if it succeeded; `note` gets its log, `options` are its parameters."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback, set_verbose

    set_verbose(False)
    params: Any = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant_type}")
    for name, value in options.items():
        setattr(params, name, value)
    importance = imatrix.pointer_to(matrix)
    if matrix:
        params.imatrix = importance

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        note(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p())
    status = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.pointer(params))
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p())  # before `log` is garbage-collected
    return status


def quantize(source: Path, target: Path, quant_type: str, matrix: imatrix.Matrix) -> None:
    """Quantize a 16-bit GGUF to llama.cpp's type of that name, by an importance matrix that may be empty.

    Raises `Fail`.
    """
    with tqdm(desc=f"quantize {quant_type}", unit="tensor") as bar:

        def progress(text: str) -> None:
            if found := re.match(r"\[ *\d+/ *(\d+)\]", text):
                bar.total = int(found[1])
                bar.update()

        cores = len(os.sched_getaffinity(0))
        status = run_quantizer(source, target, quant_type, matrix, progress, nthread=cores, max_buf_size=MAX_BUF_SIZE)
    if status != 0:
        raise Fail(
            f"llama.cpp could not quantize {source} to {quant_type} (status {status}); free memory and disk, then run "
            "`dvc repro`"
        )
