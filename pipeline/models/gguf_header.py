"""The header of a GGUF -> its metadata, once the file is known to be whole: before native code reads a byte of it.

The format is in ggml's docs/gguf.md. The `gguf` library's reader makes an array of every token's text, which takes ten
seconds for Llama 3's vocabulary; this one passes over arrays.
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

from pipeline.core.stage import Fail

OWN = "medical-reasoner."  # what our own keys begin with
SYSTEM_PROMPT = f"{OWN}system_prompt"  # the one that the model was trained with
LICENCE = "general.license.name"
LLAMA_3_LICENCE = "Meta Llama 3 Community License"

VERSION = 3
MOST = 1 << 16  # keys, and tensors: llama.cpp's own files have some dozens and some hundreds
SCALARS = dict(enumerate(["B", "b", "<H", "<h", "<I", "<i", "<f", "?"])) | {10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ALIGNMENT = "general.alignment"


class Cursor:
    """A place in a file's bytes. Reading past the end raises ValueError, or struct's own error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, form: str) -> Any:
        """The next number, its type as struct writes it."""
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def skip(self, size: int) -> None:
        """Go on `size` bytes."""
        if size > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += size

    def string(self) -> str:
        """The next text."""
        start = self.at + 8
        self.skip(8 + struct.unpack_from("<Q", self.data, self.at)[0])
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        """The next value of a kind; of an array None, as it is only passed over."""
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


def parse(cursor: Cursor) -> dict[str, Any]:
    """Key -> value, without the arrays; raises ValueError or struct.error unless all tensors are there."""
    from gguf import GGML_QUANT_SIZES

    if cursor.data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.skip(4)
    version, tensors, keys = cursor.scalar("<I"), cursor.scalar("<Q"), cursor.scalar("<Q")
    if version != VERSION or tensors > MOST or keys > MOST:
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
    for number in range(tensors):
        cursor.string()
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
        end += padded(prod(shape) // block * size, alignment)
    if tensors:
        cursor.skip(padded(cursor.at, alignment) - cursor.at + end)
    return found


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> value of a GGUF's metadata, without its arrays; raises `Fail` if the file is no whole GGUF."""
    again = f"run `dvc pull`, `dvc checkout {path}` or `dvc repro`"
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse(Cursor(data))
    except FileNotFoundError:
        raise Fail(f"{path} is missing; {again}") from None
    except OSError as error:
        raise Fail(f"{path} cannot be read ({error.strerror}); {again}") from None
    except (ValueError, struct.error) as error:
        raise Fail(f"{path} is no whole GGUF file ({error}); {again}") from None
