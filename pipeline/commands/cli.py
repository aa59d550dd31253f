"""Running a command's `main` with typer: its module's docstring is the help, a user's mistake is one line."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from pipeline.core.errors import Fail, sentence


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
        if (told := sentence(error)) is None:
            raise
        sys.exit(f"{name}: {told}")


def require_clone() -> None:
    """Raise `Fail` outside a git repository: DVC does not start there, and does not say what to do."""
    if not Path(".git").exists():
        raise Fail("this directory is no git clone, and DVC needs one (a ZIP has no .git); clone it, or run `git init`")


def dvc(*arguments: str) -> str:
    """What a command of DVC prints; raises `Fail` with its error."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = next((line for line in done.stderr.splitlines() if "ERROR" in line), "no reason given")
        raise Fail(f"`dvc {' '.join(arguments)}` failed ({why}); run it by itself")
    return done.stdout
