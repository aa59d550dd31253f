"""Where the questions come from: data/raw/source.json."""

from pydantic import BaseModel, ConfigDict


class Source(BaseModel):
    """Name, licence and hub data set of the questions."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    simulated: bool
    name: str
    licence: str  # "" if it is the user's own
    dataset: str  # a data set of the hub, or ""
    records: str  # the user's name of ori_pqal.json, for error messages
    test_ground_truth: str  # likewise
