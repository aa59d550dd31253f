"""models/quantized: the GGUF files of the types after the first, and SHA256SUMS, which lists them in their order.

The list is there even if it is empty: git and DVC lose a directory without files.
"""

from pathlib import Path

from pipeline.core.errors import Fail
from pipeline.core.files import read_text, sha256
from pipeline.models.gguf_header import read_header

SUMS = "SHA256SUMS"  # in the format of sha256sum


def write_sums(directory: Path, paths: list[Path]) -> None:
    """Write the list of the files."""
    (directory / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in paths), encoding="utf-8")


def read_sums(directory: Path) -> dict[Path, str]:
    """Path -> sha256 of the files in `directory`; raises `Fail` if one is missing."""
    lines = (line.split() for line in read_text(directory / SUMS).splitlines())
    found = {directory / name: digest for digest, name in lines}
    if absent := [path for path in found if not path.is_file()]:
        raise Fail(f"{absent[0]} is missing; run `dvc pull`, `dvc checkout {directory}` or `dvc repro`")
    return found


def by_type(gguf: Path, directory: Path) -> dict[str, Path]:
    """llama.cpp's name of the type -> file: `gguf`, then those in `directory`; raises `Fail`."""
    return {read_header(path).file_type: path for path in (gguf, *read_sums(directory))}
