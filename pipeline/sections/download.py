"""Section `download`: where the questions come from."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipeline.core.params import Section

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=20, le=100_000)]


class File(Section):
    """A file's name and content hash."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    sha256: Sha256


class Files(Section):
    """PubMedQA's two files, or files in their schema."""

    source: Literal["files"]
    location: str  # a URL or a directory that holds both files
    records: File
    test_ground_truth: File


class Simulated(Section):
    """Simulated trials."""

    source: Literal["simulated"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    questions: Count  # for training and validation
    test_questions: Count


DOWNLOAD: TypeAdapter[Files | Simulated] = TypeAdapter(Annotated[Files | Simulated, Field(discriminator="source")])
