"""Importance matrix: how much each column of a matrix matters, from the activations that it is multiplied with.

llama.cpp evaluates training examples with the 16-bit model. For every matrix of the transformer blocks, the squares of
the columns' activations are summed over all tokens, as llama.cpp's tool `llama-imatrix` does; the quantizer weights
rounding errors with their means. The file has the tool's format (tools/imatrix/imatrix.cpp, `save_imatrix`).
"""

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.core.errors import Fail
from pipeline.models.gguf_header import read_header

N_BATCH = 512  # tokens of one evaluation: the logits of each are computed, half a megabyte a token for Llama 3
REMEDY = "choose another base, or set quantize.imatrix_questions to 0"


class Entry(NamedTuple):
    """Sums for one matrix."""

    squares: NDArray[np.float64]  # summed over tokens; shape (columns,)
    tokens: int

    @property
    def importance(self) -> NDArray[np.float32]:
        """Mean squares, shape (columns,): what the quantizer takes."""
        return (self.squares / self.tokens).astype(np.float32)


Matrix = dict[str, Entry]  # name of a matrix in the GGUF -> its entry; empty if there is no importance matrix


class Tensor(ctypes.Structure):
    """The beginning of `struct ggml_tensor` (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class Collector:
    """llama.cpp's evaluation callback, which sees every operation before and after it is computed."""

    def __init__(self, matrices: Sequence[str]) -> None:
        """Collect for `matrices`."""
        import llama_cpp
        from llama_cpp._ggml import libggml

        self.ggml: Any = libggml
        self.ggml.ggml_op_name.restype = ctypes.c_char_p
        self.ggml.ggml_backend_tensor_get.argtypes = 2 * [ctypes.c_void_p] + 2 * [ctypes.c_size_t]
        self.matrices, self.matrix = set(matrices), Matrix()
        self.callback: Any = llama_cpp.ggml_backend_sched_eval_callback(self.see)  # keeps it from garbage collection

    def see(self, pointer: int, ask: bool, user_data: int) -> bool:
        """Whether to stop after this operation, if `ask`; else add its activations, and True to go on."""
        tensor = Tensor.from_address(pointer)
        if ask and self.ggml.ggml_op_name(tensor.op) != b"MUL_MAT":
            return False
        # On a card with a copy of the matrix the name is CUDA0#blk.0.attn_k.weight#0.
        name = re.sub(r"^[^#]*#|#.*$", "", Tensor.from_address(tensor.src[0]).name.decode())
        if name in self.matrices and not ask:
            self.add(name, tensor.src[1])
        return name in self.matrices or not ask

    def add(self, name: str, pointer: int) -> None:
        """Add the squares of activations, a float32 tensor with a token in each row, wherever its memory is."""
        tensor = Tensor.from_address(pointer)
        shape, strides = tensor.ne[::-1], tensor.nb[::-1]
        size = 4 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
        data = np.empty(size, dtype=np.uint8)
        self.ggml.ggml_backend_tensor_get(pointer, data.ctypes.data, 0, size)
        rows = np.ndarray(shape, np.float32, data, strides=strides).reshape(-1, shape[-1])
        squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        before = self.matrix.get(name, Entry(np.zeros_like(squares), 0))
        self.matrix[name] = Entry(before.squares + squares, before.tokens + len(rows))


def collect(gguf: Path, texts: Sequence[Sequence[int]]) -> Matrix:
    """The importance matrix of a 16-bit GGUF over texts of token ids, each evaluated alone; raises `Fail`."""
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    lib: Any = llama_cpp
    header = read_header(gguf)
    matrices = [name for name, tensor in header.tensors.items() if name.startswith("blk.") and len(tensor.shape) > 1]
    collector = Collector(matrices)
    model, context = load(lib, gguf, header.layers, max(map(len, texts)), collector.callback)
    batch = lib.llama_batch_init(N_BATCH, 0, 1)
    try:
        for text in tqdm(texts, "importance matrix"):
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
            for start in range(0, len(text), N_BATCH):
                # With logits of the last token alone, the last block's matrices would see that token only.
                batch.n_tokens = len(text[start : start + N_BATCH])
                for i, token in enumerate(text[start : start + N_BATCH]):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, True
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                if status := lib.llama_decode(context, batch):
                    raise Fail(f"llama.cpp could not evaluate a training example (status {status}); free memory")
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)
    check(collector.matrix, matrices, sum(map(len, texts)))
    return collector.matrix


def load(lib: Any, gguf: Path, layers: int, n_ctx: int, callback: Any) -> tuple[Any, Any]:
    """llama.cpp's model and context, with as many layers on the card as it holds; raises `Fail`."""
    params, options = lib.llama_model_default_params(), lib.llama_context_default_params()
    params.use_extra_bufts = False  # repacking would copy the weights, which else are mapped from the file
    options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, N_BATCH, N_BATCH
    options.flash_attn_type = 0
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    options.cb_eval = callback
    steps = range(layers + 1, 0, -max(1, layers // 8)) if lib.llama_supports_gpu_offload() else ()
    for n_gpu_layers in (*steps, 0):
        params.n_gpu_layers = n_gpu_layers
        if model := lib.llama_model_load_from_file(bytes(gguf), params):
            if context := lib.llama_init_from_model(model, options):
                return model, context
            lib.llama_model_free(model)
    raise Fail(f"llama.cpp found no memory for {gguf}; free memory, then run `dvc repro`")


def check(matrix: Matrix, matrices: Sequence[str], tokens: int) -> None:
    """Raise `Fail` unless every matrix has an entry, over all tokens and finite."""
    bad = [name for name in matrices if name not in matrix or matrix[name].tokens != tokens]
    if bad:
        raise Fail(f"{len(bad)} of {len(matrices)} matrices, such as {bad[0]}, have no importance; {REMEDY}")
    if bad := [name for name in matrices if not np.isfinite(matrix[name].squares).all()]:
        raise Fail(f"the model's activations at {bad[0]} are not finite; train with a lower train.learning_rate")


def write(path: Path, matrix: Matrix, questions: int) -> None:
    """Write the matrix in llama.cpp's format; without entries if it is empty."""
    import gguf

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].clear()  # the architecture, which such a file does not have
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["training questions"])
    writer.add_uint32("imatrix.chunk_count", questions)
    tokens = max((entry.tokens for entry in matrix.values()), default=0)
    writer.add_uint32("imatrix.chunk_size", round(tokens / questions) if matrix else 0)  # on average
    for name, entry in sorted(matrix.items()):
        writer.add_tensor(f"{name}.in_sum2", entry.squares.astype(np.float32)[np.newaxis])
        writer.add_tensor(f"{name}.counts", np.array([[entry.tokens]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> Matrix:
    """The matrix in a file of llama.cpp's format."""
    from gguf import GGUFReader

    found = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    names = [name.removesuffix(".counts") for name in found if name.endswith(".counts")]
    return {
        name: Entry(found[f"{name}.in_sum2"].ravel().astype(float), int(found[f"{name}.counts"].item()))
        for name in names
    }


def pointer_to(matrix: Matrix) -> Any:
    """The matrix as llama_model_quantize_params.imatrix; keep it until the quantizer has returned."""
    import llama_cpp

    array = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # the last one, zeros, ends the list
    array.kept = []  # pyright: ignore[reportAttributeAccessIssue]
    for item, (name, entry) in zip(array, matrix.items(), strict=False):
        values = np.ascontiguousarray(entry.importance)
        array.kept.append(values)  # pyright: ignore[reportAttributeAccessIssue]
        item.name, item.size = name.encode(), len(values)
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return array
