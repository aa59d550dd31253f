"""A GGUF's header is read as the `gguf` library reads it, and nothing but a whole file gets to native code."""

import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pipeline.core.stage import Fail
from pipeline.models import gguf_header as header
from pipeline.models.gguf_header import read_metadata
from tests.conftest import ROOT, tried
from tests.tables import write_gguf

CASES = int(os.environ.get("BAD_INPUTS", "40"))  # benchmarks/faults.py: many more


def write(writer: gguf.GGUFWriter) -> None:
    """Write out what was added to the writer."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A GGUF with a value of every type and two tensors, quantized and not."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    numbers = {"uint8": 200, "int8": -7, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000, "int32": -5}
    numbers |= {"uint64": 1 << 60, "int64": -(1 << 60), "float32": 0.5, "float64": 1e-4, "bool": True}
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_string("a.text", "Größe")
    writer.add_token_list(["a", "bc", ""])
    writer.add_token_types([1, 2, 3])
    writer.add_tensor("weight", np.ones((3, 64), dtype=np.float32))
    quantized = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    write(writer)
    return tmp_path / "model.gguf"


def by_the_library(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    array = gguf.GGUFValueType.ARRAY
    return {name: field.contents() for name, field in fields.items() if field.types and field.types[0] != array}


def test_all_types_of_values_are_those_of_the_library(path: Path):
    expected = {name: value for name, value in by_the_library(path).items() if not name.startswith("GGUF.")}
    assert len(expected) == 13
    assert read_metadata(path) == expected


def test_the_shipped_file_too(micro: Path):
    gguf_path = micro / "models" / "medical-reasoner.gguf"
    found = read_metadata(gguf_path)
    assert found == {name: value for name, value in by_the_library(gguf_path).items() if not name.startswith("GGUF.")}
    assert "tokenizer.chat_template" in found


def test_cut_anywhere_it_is_refused(path: Path):
    body = path.read_bytes()
    for length in range(len(body)):
        path.write_bytes(body[:length])
        with pytest.raises(Fail, match=r"no whole GGUF file.*dvc checkout"):
            read_metadata(path)


@pytest.mark.parametrize("alignment", [8, 16, 32, 64, 128])
def test_tensors_of_one_to_four_dimensions_at_any_alignment(tmp_path: Path, alignment: int):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for shape in ((5,), (5, 3), (5, 3, 2), (5, 3, 2, 7)):
        writer.add_tensor(f"weight of {len(shape)}", np.ones(shape, dtype=np.float32))
    write(writer)
    assert read_metadata(path) == {"general.architecture": "llama", "general.alignment": alignment}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Fail, match="it ends too early"):
        read_metadata(path)


@pytest.mark.parametrize(("keys", "tensors"), [(1, 3), (4, 2)])
def test_no_more_keys_and_tensors_than_any_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: int, tensors: int
):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")  # a key of its own
    for number in range(keys - 1):
        writer.add_bool(f"key {number}", True)
    for number in range(tensors):
        writer.add_tensor(f"tensor {number}", np.ones(3, dtype=np.float32))
    write(writer)
    monkeypatch.setattr(header, "MOST", max(keys, tensors))
    assert len(read_metadata(path)) == keys
    monkeypatch.setattr(header, "MOST", max(keys, tensors) - 1)
    with pytest.raises(Fail, match=f"{tensors} tensors and {keys} keys"):
        read_metadata(path)


def test_bytes_after_the_tensors_do_no_harm(path: Path):
    whole = read_metadata(path)
    path.write_bytes(path.read_bytes() + bytes(100))
    assert read_metadata(path) == whole


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (0, b"GGML", "begin with GGUF"),
        (4, struct.pack("<I", 2), "version 2"),
        (8, struct.pack("<Q", 1 << 40), "tensors"),
        (16, struct.pack("<Q", 1 << 40), "keys"),
        (24, struct.pack("<Q", 1 << 63), "too early"),
    ],
)
def test_an_altered_header_is_refused(path: Path, at: int, value: bytes, problem: str):
    body = path.read_bytes()
    path.write_bytes(body[:at] + value + body[at + len(value) :])
    with pytest.raises(Fail, match=problem):
        read_metadata(path)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"Gr\xc3\xb6\xc3\x9fe", b"Gr\xff\xb6\xc3\x9fe", "utf-8"),
        # The tensor's dimensions, of which there are two, 64 and 3.
        (b"weight" + struct.pack("<I", 2), b"weight" + struct.pack("<I", 0), "0 dimensions"),
        (b"weight" + struct.pack("<I", 2), b"weight" + struct.pack("<I", 5), "5 dimensions"),
        (b"weight" + struct.pack("<IQQ", 2, 64, 3), b"weight" + struct.pack("<IQQ", 2, 64, 4), "wrong place"),
        (b"weight" + struct.pack("<IQQI", 2, 64, 3, 0), b"weight" + struct.pack("<IQQI", 2, 64, 3, 77), "unknown type"),
        (struct.pack("<IQQI", 2, 64, 2, 8), struct.pack("<IQQI", 2, 63, 2, 8), "rows of 63"),
        (b"a.text" + struct.pack("<I", 8), b"a.text" + struct.pack("<I", 13), "type 13"),
    ],
)
def test_an_altered_entry_is_refused(path: Path, old: bytes, new: bytes, problem: str):
    body = path.read_bytes()
    assert body.count(old) == 1
    path.write_bytes(body.replace(old, new))
    with pytest.raises(Fail, match=problem):
        read_metadata(path)


def test_no_file_and_no_text_of_it_in_the_error(tmp_path: Path):
    with pytest.raises(Fail, match="is missing"):
        read_metadata(tmp_path / "none.gguf")
    write_gguf(tmp_path / "cut.gguf", system_prompt="SECRET")
    body = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(body[:-1])
    with pytest.raises(Fail) as found:
        read_metadata(tmp_path / "cut.gguf")
    assert "SECRET" not in str(found.value)


# In a process of its own: what native code makes of a file that it should never have seen can end the process.
PROGRAM = """
import sys
from pathlib import Path
from pipeline.scoring.scorer import Scorer
from pipeline.core.stage import Fail
for line in sys.stdin:
    try:
        with Scorer(Path(line.strip()), 256) as scorer:
            scorer.score(*scorer.chat([{"role": "user", "content": "Is it?"}]))
        print("read", flush=True)
    except Fail as error:
        print(error, flush=True)
"""


def test_damaged_files_never_end_the_process(micro: Path, tmp_path: Path):
    body = (micro / "models" / "medical-reasoner.gguf").read_bytes()
    rng = random.Random(7)
    end = gguf.GGUFReader(micro / "models" / "medical-reasoner.gguf").data_offset
    damaged = tmp_path / "damaged.gguf"
    answers: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(CASES):
            at, size = rng.randrange(end), rng.choice([0, 1, 4, 8])
            damaged.write_bytes(body[:at] + (rng.randbytes(size) + body[at + size :] if size else b""))
            print(damaged, file=process.stdin, flush=True)
            answer = process.stdout.readline().strip()
            kind = (
                ("inputs_accepted", "a damaged GGUF, still whole")
                if answer == "read"
                else ("bad_inputs", "a damaged GGUF")
            )
            with tried(*kind) as seen:
                assert answer, f"the process ended with {process.wait()} at byte {at}, {size} bytes"
                seen.append(answer)
                if answer == "read":  # a token's text may change: nothing can tell that but a checksum
                    assert size
                    assert by_the_library(damaged)["general.architecture"] == "llama"
                    seen.append("nothing: it is still a whole GGUF, for the gguf library too")
            answers.append(answer)
        process.stdin.close()
    assert process.returncode == 0
    assert any("no whole GGUF file" in answer for answer in answers)
    assert "read" in answers
