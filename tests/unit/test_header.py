"""A GGUF's header is read as the `gguf` library reads it, and only a complete file reaches native code."""

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pipeline.core.errors import Fail
from pipeline.models import gguf_header
from pipeline.models.gguf_header import read_header

CASES = 40
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def write(path: Path, tensors: dict[str, Any], **values: Any) -> Path:
    """Write a GGUF with these tensors; `values` are the arguments of the writer's `add_<name>`."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, arguments in values.items():
        getattr(writer, f"add_{name}")(*arguments)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=Q8_0 if tensor.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A GGUF with a value of every type and two tensors, quantized and not."""
    numbers = {"uint8": 200, "int8": -7, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000, "int32": -5}
    numbers |= {"uint64": 1 << 60, "int64": -(1 << 60), "float32": 0.5, "float64": 1e-4, "bool": True}
    values = {name: (f"a.{name}", value) for name, value in numbers.items()} | {"string": ("a.text", "Größe")}
    quantized = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), Q8_0)
    tensors = {"weight": np.ones((3, 64), dtype=np.float32), "quantized": quantized}
    return write(tmp_path / "x.gguf", tensors, token_list=(["a", "bc", ""],), token_types=([1, 2, 3],), **values)


def by_the_library(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    array = gguf.GGUFValueType.ARRAY
    found = {name: field.contents() for name, field in fields.items() if field.types and field.types[0] != array}
    return {name: value for name, value in found.items() if not name.startswith("GGUF.")}


def test_values_of_every_type_are_those_of_the_library(path: Path):
    assert len(read_header(path).metadata) == 13
    assert read_header(path).metadata == by_the_library(path)
    assert read_header(path).types == {"F32": 1, "Q8_0": 1}


def test_cut_anywhere_it_is_refused(path: Path):
    body, data = path.read_bytes(), gguf.GGUFReader(path).data_offset
    for length in [*range(data), *range(data, len(body), 32), len(body) - 1]:
        path.write_bytes(body[:length])
        with pytest.raises(Fail, match="not a complete GGUF file"):
            read_header(path)


@pytest.mark.parametrize("alignment", [8, 16, 32, 64, 128])
def test_tensors_of_one_to_four_dimensions_at_any_alignment(tmp_path: Path, alignment: int):
    tensors = {f"of {len(shape)}": np.ones(shape, np.float32) for shape in ((5,), (5, 3), (5, 3, 2), (5, 3, 2, 7))}
    path = write(tmp_path / "x.gguf", tensors, custom_alignment=(alignment,))
    assert read_header(path).metadata == {"general.architecture": "llama", "general.alignment": alignment}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Fail, match="truncated"):
        read_header(path)


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "tensors"])
def test_more_keys_or_tensors_than_any_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: bool
):
    values: Any = {"bool": ("a", True), "uint8": ("b", 1)} if keys else {}  # and the architecture
    path = write(tmp_path / "x.gguf", {str(i): np.ones(3, np.float32) for i in range(1 if keys else 3)}, **values)
    monkeypatch.setattr(gguf_header, "MAX_ENTRIES", 3)
    read_header(path)
    monkeypatch.setattr(gguf_header, "MAX_ENTRIES", 2)
    with pytest.raises(Fail, match="1 tensors and 3 keys" if keys else "3 tensors and 1 keys"):
        read_header(path)


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (0, b"GGML", "begin with GGUF"),
        (4, struct.pack("<I", 2), "version 2"),
        (8, struct.pack("<Q", 1 << 40), "tensors"),
        (16, struct.pack("<Q", 1 << 40), "keys"),
        (24, struct.pack("<Q", 1 << 63), "truncated"),
    ],
)
def test_an_altered_header_is_refused(path: Path, at: int, value: bytes, problem: str):
    body = path.read_bytes()
    path.write_bytes(body[:at] + value + body[at + len(value) :])
    with pytest.raises(Fail, match=problem):
        read_header(path)


def entry(*numbers: int) -> bytes:
    """A tensor's number of dimensions, dimensions, and type if there is one."""
    return struct.pack(f"<I{'Q' * min(2, len(numbers) - 1)}{'I' * (len(numbers) > 3)}", *numbers)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"Gr\xc3\xb6\xc3\x9fe", b"Gr\xff\xb6\xc3\x9fe", "utf-8"),
        (b"weight" + entry(2), b"weight" + entry(0), "0 dimensions"),
        (b"weight" + entry(2), b"weight" + entry(5), "5 dimensions"),
        (b"weight" + entry(2, 64, 3), b"weight" + entry(2, 64, 4), "wrong place"),
        (b"weight" + entry(2, 64, 3, 0), b"weight" + entry(2, 64, 3, 77), "unknown type"),
        (entry(2, 64, 2, 8), entry(2, 63, 2, 8), "rows of 63"),
        (b"a.text" + struct.pack("<I", 8), b"a.text" + struct.pack("<I", 13), "type 13"),
    ],
)
def test_an_altered_entry_is_refused(path: Path, old: bytes, new: bytes, problem: str):
    body = path.read_bytes()
    assert body.count(old) == 1
    path.write_bytes(body.replace(old, new))
    with pytest.raises(Fail, match=problem):
        read_header(path)


def test_a_damaged_file_is_refused_in_one_sentence_or_read_as_the_library_reads_it(path: Path):
    body, data, rng = path.read_bytes(), gguf.GGUFReader(path).data_offset, random.Random(7)
    for _ in range(CASES):
        at, size = rng.randrange(data), rng.choice([0, 1, 4, 8])
        path.write_bytes(body[:at] + (rng.randbytes(size) + body[at + size :] if size else b""))
        found, said = {}, ""
        try:
            found = read_header(path).metadata
        except Fail as error:
            said = str(error)
        assert said.isprintable()
        assert said or found.keys() == by_the_library(path).keys()
