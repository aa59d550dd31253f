"""Section `report`: how predictions are compared."""

from typing import Annotated

from pydantic import Field

from pipeline.core.params import Section


class Report(Section):
    """Bootstrap and calibration settings."""

    bootstrap_samples: Annotated[int, Field(ge=1000, le=1_000_000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    confidence: Annotated[float, Field(gt=0.5, le=0.9999)]
    bins: Annotated[int, Field(ge=2, le=50)]  # of the reliability diagram and the expected calibration error
