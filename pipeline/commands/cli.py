"""Running a command's `main` with typer: its module's docstring is the help, a user's mistake is one line."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from pipeline.core.errors import Fail, disk_problem


def run_command(name: str, main: Callable[..., Any], arguments: list[str]) -> None:
    """Call `main` with options and arguments parsed from `arguments`; exits with status 1 on a `Fail`."""

    @functools.wraps(main)
    def interruptible(*args: Any, **options: Any) -> None:
        try:
            main(*args, **options)
        except KeyboardInterrupt:  # typer would print 'Aborted!', which names no command
            sys.exit(f"{name}: interrupted; run the same command again")

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=main.__globals__["__doc__"])(interruptible)
    try:
        app(arguments, prog_name=f"python -m pipeline {name}")
    except Exception as error:
        sentence = str(error) if isinstance(error, Fail) else disk_problem(error)
        if sentence is None:
            raise
        sys.exit(f"{name}: {sentence}")


def require_clone() -> None:
    """Raise `Fail` outside a git repository: DVC does not start there, and does not say what to do."""
    if not Path(".git").exists():
        raise Fail("this directory is no git clone, and DVC needs one (a ZIP has no .git); clone it, or run `git init`")
