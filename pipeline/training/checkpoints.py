"""Checkpoints of a training: transformers writes them in place, so a list of their files' sha256 is written last."""

import json
import os
from pathlib import Path

from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from pipeline.core.outputs import remove

COMPLETE = "complete.json"  # in a checkpoint, written last: file name -> sha256
SAVE_STEPS = 20  # from one checkpoint to the next: what a kill can cost; SAVE_STEPS in the environment overrides it


def save_steps() -> int:
    """Steps between checkpoints. An environment variable, because it changes no result."""
    value = os.environ.get("SAVE_STEPS", str(SAVE_STEPS))
    if not value.isascii() or not value.isdecimal() or not 0 < int(value) < 2**31:
        raise Fail("the environment variable SAVE_STEPS must be a whole number above 0; set it to one, or unset it")
    return int(value)


def digests(checkpoint: Path) -> dict[str, str]:
    """File name -> sha256 of what the trainer wrote into a checkpoint."""
    return {path.name: sha256(path) for path in checkpoint.iterdir() if path.name != COMPLETE}


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`; removes newer ones that are truncated or altered."""
    for path in sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            if json.loads((path / COMPLETE).read_bytes()) == digests(path):
                return path
        except (ValueError, OSError):
            pass
        remove(path)
    return None
