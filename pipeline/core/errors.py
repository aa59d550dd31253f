"""Errors that end a command with one sentence instead of a traceback."""

import errno
import re


class Fail(Exception):  # noqa: N818  # short, because it is raised in so many places
    """A user's mistake or a missing input: one sentence that says what is wrong, where, and what to run next."""

    def __str__(self) -> str:
        # The sentence can quote a key or a path with control characters or a lone surrogate in it.
        return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in self.args[0])


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}
# The messages of safetensors and torch when a write fails.
NATIVE = re.compile(
    r"No space left on device|File too large|Read-only file system|PytorchStreamWriter failed|unexpected pos \d+ vs \d+"
    r"|\d+ requested and \d+ written"
)


def sentence(error: BaseException) -> str | None:
    """For a `Fail`, a full or read-only disk or a directory where a file should be; None for any other error."""
    if isinstance(error, Fail):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'an output'}: {error.strerror}; free disk or fix that path, then run `dvc repro`"
    found = NATIVE.search(str(error))
    return f"an output could not be written ({found[0]}); free disk, then run `dvc repro`" if found else None
