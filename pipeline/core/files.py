"""Reading files that the pipeline wrote. Every error names file and line, and never quotes a question's text."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.core.errors import Fail

Model = TypeVar("Model")
Row = TypeVar("Row", bound=BaseModel)


def read_text(path: Path) -> str:
    """The text in `path`; raises `Fail` if it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise Fail(f"{path} is missing; run `dvc repro`") from None
    except UnicodeDecodeError as error:
        raise Fail(f"{path}, byte {error.start}: not valid UTF-8; run `dvc checkout` or `dvc repro`") from None


def parse(model: type[Model], text: str | bytes, place: str) -> Model:
    """JSON `text` as `model`; raises `Fail` naming `place` and the first field that is wrong."""
    try:
        return TypeAdapter(model).validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        field = "".join(f"{part}: " for part in problem["loc"])
        raise Fail(f"{place}: {field}{problem['msg']}; run `dvc checkout` or `dvc repro`") from None


def read_as(model: type[Model], path: Path) -> Model:
    """The JSON file `path` as `model`; raises `Fail`."""
    return parse(model, read_text(path), str(path))


def read_rows(path: Path, model: type[Row]) -> list[Row]:
    """The rows of a JSON Lines file; raises `Fail` if there is none."""
    lines = read_text(path).removesuffix("\n").split("\n")
    return [parse(model, line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def iterate_rows(path: Path, model: type[Row]) -> Iterator[Row]:
    """The rows of a JSON Lines file that may not fit into memory, one after the other; raises `Fail`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield parse(model, line, f"{path}, line {number}")
    except FileNotFoundError:
        raise Fail(f"{path} is missing; run `dvc repro`") from None


def sha256(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
