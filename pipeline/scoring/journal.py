"""The journal of a stage that asks a model many questions: a killed run loses none of the answers."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pipeline.core.resume import CHECKPOINTS

Asked = TypeVar("Asked")
Row = TypeVar("Row")


def whole_rows(data: bytes, asked: Sequence[Asked], parse: Callable[[bytes, Asked], Row]) -> tuple[list[Row], int]:
    """The rows at a journal's beginning that answer `asked`, in its order, and the bytes that they take.

    `parse` raises ValueError or TypeError for a line that is no answer to what was asked.
    """
    rows: list[Row] = []
    end = 0
    for line, one in zip(data.splitlines(keepends=True), asked, strict=False):
        try:
            row = parse(line, one)
        except (ValueError, TypeError):  # truncated by a kill, or zeros after a crash of the machine
            break
        if line[-1:] != b"\n":
            break
        rows.append(row)
        end += len(line)
    return rows, end


@contextmanager
def journal(
    key: str, asked: Sequence[Asked], parse: Callable[[bytes, Asked], Row], line: Callable[[Row], str]
) -> Generator[tuple[list[Row], Callable[[Row], None]]]:
    """The rows that a killed run with this key had written, and a function that adds one; removed if nothing is raised.

    A question takes a second or more on a laptop, so a run may take hours. `line` is the inverse of `parse`, without
    the line's end.
    """
    path = CHECKPOINTS / f"{key}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        rows, end = whole_rows(file.read(), asked, parse)
        file.truncate(end)

        def keep(row: Row) -> None:
            rows.append(row)
            file.write(line(row).encode() + b"\n")
            file.flush()

        try:
            yield rows, keep
        except BaseException:
            if not rows:
                forget(path)
            raise
        forget(path)


def forget(path: Path) -> None:
    """Remove a journal, and its directory if that is empty: train's checkpoints may be there too."""
    path.unlink()
    with suppress(OSError):
        CHECKPOINTS.rmdir()
