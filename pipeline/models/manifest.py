"""Which weights a base has: models/base/manifest.json, and what an adapter was trained on."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.core.files import read_as

MANIFEST = "manifest.json"
TEMPLATE = "chat_template.jinja"  # beside it: the chat template in a file of its own
ADAPTER = "adapter_model.safetensors"  # PEFT's name
IDENTITY = "trained_on.json"  # beside it: an `Identity`


class Strict(BaseModel):
    """A frozen model without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class WeightFile(Strict):
    """A safetensors file: a name without a path, size in bytes and sha256."""

    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(Strict):
    """Where a base's weights are: `repo_id` and `revision` on the hub, or the directory `path`."""

    source: Literal["hub", "local", "tiny"]
    repo_id: str = ""
    revision: str = ""
    path: str = ""
    note: str = ""  # how the weights differ from the ones that the name promises: `weights_note` in config.json
    files: Annotated[list[WeightFile], Field(min_length=1)]

    @property
    def name(self) -> str:
        """The base's name for people."""
        return self.repo_id or {"local": "a local model", "tiny": "tiny Llama"}[self.source]


class Identity(Strict):
    """models/adapter/trained_on.json: the adapter's sha256 and the weights that it was trained on."""

    adapter: str
    files: list[WeightFile]


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`; raises `Fail`."""
    return read_as(Manifest, directory / MANIFEST)
