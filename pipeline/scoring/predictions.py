"""Tables of predictions, metrics/predictions/*.csv: their rows, their one reader and writer. No question texts."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.core.errors import Fail
from pipeline.core.files import read_text
from pipeline.core.labels import LABELS, Label
from pipeline.core.outputs import write_csv
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.sections.evaluate import ProtocolName

COLUMNS = ["protocol", "pmid", "label", *LABELS, "prediction", "greedy", "top_token"]
UNPARSABLE = "unparsable"  # a greedy answer without a decision; never counted as 'maybe'


class Prediction(NamedTuple):
    """What a model makes of one question under one protocol."""

    protocol: ProtocolName
    pmid: str
    label: Label  # gold
    log_probabilities: tuple[float, float, float]  # natural logarithms, in the order of LABELS; they need not sum to 1
    prediction: Label
    greedy: str  # a label, UNPARSABLE, or empty where the protocol asks for no written answer
    top_token: int  # id of the most probable next token, whatever it is

    def row(self) -> list[str]:
        """The fields of COLUMNS."""
        scores = [f"{score:.6f}" for score in self.log_probabilities]
        return [self.protocol, self.pmid, self.label, *scores, self.prediction, self.greedy, str(self.top_token)]


Predictions = dict[ProtocolName, list[Prediction]]  # each list sorted by PMID


def parse(row: list[str]) -> Prediction:
    """A row of the table; raises ValueError saying what is wrong with it."""
    if len(row) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} fields, got {len(row)}")
    protocol, pmid, label, yes, no, maybe, prediction, greedy, top_token = row
    scores = (float(yes), float(no), float(maybe))
    if not all(math.isfinite(score) and score <= 1e-3 for score in scores):  # float32 rounds a little above 0
        raise ValueError("a score is not a log-probability")
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}")
    answers = (*LABELS, UNPARSABLE) if PROTOCOLS[protocol].greedy else ("",)
    if label not in LABELS or prediction not in LABELS or greedy not in answers:
        raise ValueError("unknown label")
    if scores[LABELS.index(prediction)] < max(scores):
        raise ValueError(f"prediction {prediction} is not the most probable label")
    return Prediction(protocol, pmid, label, scores, prediction, greedy, int(top_token))


def parse_predictions(text: str, name: str) -> Predictions:
    """The checked rows of a table; raises `Fail` with `name`, line and PMID.

    A header alone is an empty table: that of a model that was not measured.
    """
    try:
        header, *lines = csv.reader(io.StringIO(text, newline="")) if text else [[]]
    except csv.Error as error:
        raise Fail(f"{name} is not a CSV table ({error}); run `dvc repro`") from None
    if header != COLUMNS:
        raise Fail(f"{name} does not have the columns {','.join(COLUMNS)}; run `dvc repro`")
    rows: dict[tuple[str, str], Prediction] = {}
    for number, line in enumerate(lines, 2):
        try:
            row = parse(line)
            if (row.protocol, row.pmid) in rows:
                raise ValueError(f"the PMID is a duplicate under {row.protocol}")
        except ValueError as error:
            pmid = line[1] if len(line) > 1 else "missing"
            raise Fail(f"{name}, line {number} (PMID {pmid}): {error}; run `dvc repro`") from None
        rows[row.protocol, row.pmid] = row
    tables: Predictions = {}
    for key in sorted(rows):
        tables.setdefault(rows[key].protocol, []).append(rows[key])
    return tables


def read_predictions(path: Path) -> Predictions:
    """`parse_predictions` of a file."""
    return parse_predictions(read_text(path), str(path))


def write_predictions(path: Path, rows: Iterable[Prediction]) -> None:
    """Write the rows as a table."""
    write_csv(path, COLUMNS, (row.row() for row in rows))
