"""Writing JSON Lines files; `core.files` reads them."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from pipeline.core.outputs import writing


def write_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Write one JSON object a line."""
    with writing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(row.model_dump_json() + "\n" for row in rows)
