"""models/base -> the directory with its weights.

The fetching and checking runs in a process of its own, `python -m pipeline.models.weights`. That module either prints a
directory whose files have the manifest's sha256, or fails: an edit of it cannot change a result. So no stage depends on
it, and an edit of hub access retrains nothing.
"""

from pathlib import Path

from pipeline.core.process import run_module


def weights_directory(base: Path, verify: bool = True) -> Path:
    """The directory with configuration, tokenizer and weights of the model in `base`; raises `Fail`.

    Fetches a hub model's files at the manifest's commit where the hub's cache lacks them. With `verify` false only
    sizes are checked, for a stage that hashes each file itself while it reads it.
    """
    return Path(run_module("pipeline.models.weights", str(base), *([] if verify else ["--sizes"])))
