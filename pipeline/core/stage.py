"""What every stage shares: typed parameters, one-sentence errors, and outputs that appear whole or not at all."""

import errno
import fcntl
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class Fail(Exception):  # noqa: N818  # read at the raise: it is the sentence that counts
    """A user's mistake or a missing input: one sentence that says what is wrong, where, and what to run next."""

    def __str__(self) -> str:
        # It can hold a key or a path of the user's, with a line's end or half a character in it.
        return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in self.args[0])


class Section(BaseModel):
    """One stage's section of params.yaml. No defaults: DVC cannot track a default that lives in code."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def load(cls, stage: str) -> Self:
        """The section named `stage`; raises `Fail` naming every offending parameter path."""
        return cls.check(stage, read_section(stage))

    @classmethod
    def check(cls, stage: str, values: dict[str, Any]) -> Self:
        """`values` as a section; raises `Fail` naming every offending parameter path."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join([stage, *map(str, e['loc'])])}: {e['msg']}" for e in error.errors())
            raise Fail(f"params.yaml: {wrong}; correct it, then run `dvc repro`") from None


def read_section(stage: str) -> dict[str, Any]:
    """The raw values under `stage` in ./params.yaml, read as YAML 1.2 (PyYAML takes 1e-4 for a string)."""
    try:
        with Path("params.yaml").open(encoding="utf-8") as file:
            params: Any = YAML(typ="safe").load(file)  # pyright: ignore[reportUnknownMemberType]
    except FileNotFoundError:
        raise Fail("params.yaml is not in this directory; run this from the project's root") from None
    # ValueError: a date that is none, half a character; KeyError, RecursionError: tags and brackets gone wrong.
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise Fail(f"params.yaml{line} is not valid YAML; `git diff params.yaml` shows what changed") from None
    section = cast(dict[str, Any], params).get(stage) if isinstance(params, dict) else None
    if not isinstance(section, dict):
        raise Fail(f"params.yaml has no section {stage!r}; compare it with profiles/tiny.yaml")
    return cast(dict[str, Any], section)


@contextmanager
def scratch(path: Path) -> Generator[Path]:
    """Yield a hidden path beside `path` for a temporary file or directory; remove it in the end.

    Its name is fixed, so that a run after a kill removes what the killed one left.
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
    """Like `scratch`, but what was written there becomes `path` if nothing was raised."""
    with scratch(path) as partial:
        yield partial
        if partial.is_dir():  # a file replaces a file in one step, a directory only an empty one
            remove(path)
        partial.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a directory tree if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Usage:
    """What a stage costs, for metrics/<stage>_resources.json: no other stage may read that file."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Wall seconds since construction, and peak resident memory in MiB of this process and of its children."""
        own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "seconds": round(time.perf_counter() - self.start, 2),
            "peak_rss_mib": round(max(own, children) / 1024, 1),
        }


LOCK_TRIES = 100  # a tenth of a second apart: what was killed is gone by then
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}
# What safetensors and torch make of a full disk.
NATIVE = re.compile(
    r"No space left on device|File too large|Read-only file system|PytorchStreamWriter failed|unexpected pos \d+ vs \d+"
    r"|\d+ requested and \d+ written"
)


def disk_problem(error: Exception) -> str | None:
    """The sentence for a full or read-only disk or a directory in a file's place; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'an output'}: {error.strerror}; free disk or change that, then run `dvc repro`"
    found = NATIVE.search(str(error))
    return f"an output could not be written ({found[0]}); free disk, then run `dvc repro`" if found else None


def guard() -> None:
    """Under DVC, let no second stage run in this directory, and keep a copy of dvc.lock; raises `Fail`.

    DVC killed alone may leave its stage behind for a moment; a stage that a person starts by hand takes no lock. DVC
    writes dvc.lock in place, so a kill can leave half of it: `cp .dvc/tmp/dvc.lock dvc.lock` brings back what it was.
    """
    directory = os.open(".", os.O_RDONLY)  # never closed: the lock ends with the process
    for attempt in range(LOCK_TRIES):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == LOCK_TRIES - 1:
                raise Fail(
                    "another run of this pipeline is still at work in this directory; wait for it or end it, then run "
                    "`dvc repro`"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            break
    lock, copy = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock")
    if lock.is_file() and copy.parent.is_dir():
        with writing(copy) as partial:
            shutil.copyfile(lock, partial)


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` as a command, its module's docstring as help.

    A `Fail`, or a disk that is full or read-only, becomes one line and status 1.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=main.__globals__["__doc__"])(main)
    try:
        if "DVC_STAGE" in os.environ:
            guard()
        app()
    except Exception as error:
        sentence = str(error) if isinstance(error, Fail) else disk_problem(error)
        if sentence is None:
            raise
        sys.exit(f"{Path(main.__code__.co_filename).stem}: {sentence}")
