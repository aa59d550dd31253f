"""Outputs that appear whole or not at all."""

import csv
import json
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def scratch(path: Path) -> Generator[Path]:
    """Yield a hidden path beside `path` for a temporary file or directory, and remove it at the end.

    The name is fixed, so that the run after a kill removes what the killed run left.
    """
    partial = path.parent / f".{path.name}.partial"
    remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    finally:
        remove(partial)


@contextmanager
def writing(path: Path) -> Generator[Path]:
    """Like `scratch`, but rename the result to `path` unless an exception was raised."""
    with scratch(path) as partial:
        yield partial
        if partial.is_dir():  # rename replaces a file, but only an empty directory
            remove(path)
        partial.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a directory tree if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, so that equal values give equal files."""
    with writing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a header and rows as CSV."""
    with writing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
