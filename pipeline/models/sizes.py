"""The tensors of a GGUF before there are weights: llama.cpp's quantizer, in its dry run, on shapes alone."""

import os
import re
import tempfile
from collections.abc import Iterable
from math import prod
from pathlib import Path

from pipeline.core.errors import Fail
from pipeline.models.gguf import run_quantizer
from pipeline.models.gguf_header import Tensor, padded
from pipeline.models.imatrix import Entry
from pipeline.models.memory import Shape

NAMES = {  # transformers' name of a layer -> llama.cpp's
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def wide_tensors(shape: Shape) -> dict[str, Tensor]:
    """The tensors of a 16-bit GGUF, in llama.cpp's names."""

    def matrix(*shape: int) -> Tensor:
        return Tensor("F16", shape, 0, 2 * prod(shape))

    norm = Tensor("F32", (shape.hidden,), 0, 4 * shape.hidden)
    tensors = {"token_embd.weight": matrix(shape.hidden, shape.vocabulary), "output_norm.weight": norm}
    if not shape.tied:
        tensors["output.weight"] = matrix(shape.hidden, shape.vocabulary)
    for block in range(shape.layers):
        tensors |= {f"blk.{block}.attn_norm.weight": norm, f"blk.{block}.ffn_norm.weight": norm}
        tensors |= {f"blk.{block}.{NAMES[name]}.weight": matrix(*about) for name, about in shape.linear.items()}
    return tensors


def write_sparse(path: Path, shape: Shape) -> None:
    """Write a 16-bit GGUF of that shape without data: a sparse file, a few kilobytes on disk."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_layer_norm_rms_eps(1e-5)
    tensors = wide_tensors(shape)
    for name, tensor in tensors.items():
        dtype = np.dtype(np.float16 if tensor.type == "F16" else np.float32)
        writer.add_tensor_info(name, tensor.shape[::-1], dtype, tensor.bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, padded(path.stat().st_size, 32) + sum(padded(tensor.bytes, 32) for tensor in tensors.values()))


def quantized(shape: Shape, quant_types: Iterable[str], matrix: bool) -> dict[str, dict[str, Tensor]]:
    """Type -> the tensors of a GGUF of that type, as llama.cpp would quantize them, with an importance matrix or not.

    The offsets are 0. Raises `Fail` if llama.cpp refuses the shape.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found: dict[str, dict[str, Tensor]] = {}
    # llama.cpp chooses other types for some tensors if there is a matrix, whatever is in it.
    importance = {"any": Entry(np.ones(1), 1)} if matrix else {}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "shape.gguf")
        write_sparse(source, shape)
        for quant_type in quant_types:
            tensors, name = wide_tensors(shape), ""

            def note(text: str, tensors: dict[str, Tensor] = tensors) -> None:
                # llama.cpp writes the name of a tensor, and what becomes of it, in two pieces.
                nonlocal name
                if about := re.match(r"\[ *\d+/ *\d+\] +(\S+)", text):
                    name = about[1]
                if made := re.search(r"-> .* MiB \((\w+)\)", text):
                    kind = GGMLQuantizationType[made[1].upper()]
                    block, size = GGML_QUANT_SIZES[kind]
                    rows = tensors[name].shape
                    tensors[name] = Tensor(kind.name, rows, 0, prod(rows) // block * size)

            if status := run_quantizer(source, Path(directory, "none"), quant_type, importance, note, dry_run=True):
                raise Fail(f"llama.cpp cannot quantize a model of this shape to {quant_type} (status {status})")
            found[quant_type] = tensors
    return found
