"""The metadata of a GGUF, read and checked before native code opens the file.

The format is described in ggml's docs/gguf.md. The `gguf` library's reader makes an array of every token's text, which
takes ten seconds for Llama 3's vocabulary; this one skips arrays.
"""

import mmap
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import Fail

KEY_PREFIX = "medical-reasoner."  # prefix of this project's own keys
SYSTEM_PROMPT = f"{KEY_PREFIX}system_prompt"  # the one that the model was trained with
LICENCE = "general.license.name"
LLAMA_3_LICENCE = "Meta Llama 3 Community License"

VERSION = 3
FALLBACKS = {"IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "F16"}  # llama-quant.cpp
MAX_ENTRIES = 1 << 16  # keys, and tensors: llama.cpp's files have dozens of keys and hundreds of tensors
SCALARS = dict(enumerate(["B", "b", "<H", "<h", "<I", "<i", "<f", "?"])) | {10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"


class Cursor:
    """A position in a file's bytes. Reading past the end raises ValueError or struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, form: str) -> Any:
        """The next number, in struct's notation of types."""
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def skip(self, size: int) -> None:
        """Skip `size` bytes."""
        if size > len(self.data) - self.at:
            raise ValueError("it is truncated")
        self.at += size

    def string(self) -> str:
        """The next string."""
        start = self.at + 8
        self.skip(8 + struct.unpack_from("<Q", self.data, self.at)[0])
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        """The next value of a kind; None for an array, which is skipped."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"type {kind} is unknown")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[inner]))
        elif inner == STRING:
            for _ in range(count):
                self.skip(8 + struct.unpack_from("<Q", self.data, self.at)[0])
        else:
            raise ValueError(f"an array's type {inner} is unknown")
        return None


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of the alignment."""
    return -(-size // alignment) * alignment


class Tensor(NamedTuple):
    """One tensor of a GGUF."""

    type: str  # such as Q4_K
    shape: tuple[int, ...]  # the columns of a matrix first
    offset: int  # in the file
    bytes: int


class Header(NamedTuple):
    """What a GGUF says about itself."""

    metadata: dict[str, Any]  # key -> value, without the arrays
    tensors: dict[str, Tensor]

    @property
    def types(self) -> dict[str, int]:
        """Quantization type of the matrices, such as Q4_K -> their number."""
        return dict(sorted(Counter(tensor.type for tensor in self.tensors.values() if len(tensor.shape) > 1).items()))

    @property
    def layers(self) -> int:
        """The number of transformer blocks."""
        return self.metadata[f"{self.metadata['general.architecture']}.block_count"]

    @property
    def file_type(self) -> str:
        """llama.cpp's name of the file's type, such as Q4_K_M."""
        from gguf import LlamaFileType

        return LlamaFileType(self.metadata["general.file_type"]).name.removeprefix("MOSTLY_")

    @property
    def fallbacks(self) -> dict[str, int]:
        """The types that llama.cpp used in place of those whose rows must be a multiple of 256, and their numbers."""
        by_256 = "_K" in self.file_type or self.file_type.startswith(("IQ3_", "IQ4_XS"))
        return {name: count for name, count in self.types.items() if by_256 and name in FALLBACKS}


def parse(cursor: Cursor) -> Header:
    """The header; raises ValueError or struct.error unless all tensors are there."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if cursor.data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.skip(4)
    version, tensors, keys = cursor.scalar("<I"), cursor.scalar("<Q"), cursor.scalar("<Q")
    if version != VERSION or tensors > MAX_ENTRIES or keys > MAX_ENTRIES:
        raise ValueError(f"version {version}, {tensors} tensors and {keys} keys")
    found: dict[str, Any] = {}
    for _ in range(keys):
        name, kind = cursor.string(), cursor.scalar("<I")
        value = cursor.value(kind)
        if value is not None:
            found[name] = value
    alignment = found.get(ALIGNMENT, 32)
    if alignment not in (8, 16, 32, 64, 128):
        raise ValueError(f"its alignment is {alignment}")
    end = 0
    listed: dict[str, Tensor] = {}
    for number in range(tensors):
        name = cursor.string()
        dimensions = cursor.scalar("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {number} has {dimensions} dimensions")
        shape = [cursor.scalar("<Q") for _ in range(dimensions)]
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        if kind not in GGML_QUANT_SIZES or offset != end:
            raise ValueError(f"tensor {number} is of an unknown type or in a wrong place")
        block, size = GGML_QUANT_SIZES[kind]  # pyright: ignore[reportArgumentType]  # an IntEnum's member is its number
        if shape[0] % block:
            raise ValueError(f"tensor {number} has rows of {shape[0]}")
        listed[name] = Tensor(GGMLQuantizationType(kind).name, tuple(shape), offset, prod(shape) // block * size)
        end += padded(listed[name].bytes, alignment)
    start = padded(cursor.at, alignment)
    if tensors:
        cursor.skip(start - cursor.at + end)
    return Header(found, {name: tensor._replace(offset=start + tensor.offset) for name, tensor in listed.items()})


def read_header(path: Path) -> Header:
    """Metadata and types of a GGUF; raises `Fail` if the file is not complete."""
    remedy = f"run `dvc pull`, `dvc checkout {path}` or `dvc repro`"
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse(Cursor(data))
    except FileNotFoundError:
        raise Fail(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise Fail(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, struct.error) as error:
        raise Fail(f"{path} is not a complete GGUF file ({error}); {remedy}") from None
