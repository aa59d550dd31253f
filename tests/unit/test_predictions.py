"""A table of predictions is read as it was written, or a bad row is named by file, line and PMID."""

from pathlib import Path

import pytest

from pipeline.core.errors import Fail
from pipeline.scoring.predictions import COLUMNS, Prediction, read_predictions, write_predictions

HEADER = "protocol,pmid,label,yes,no,maybe,prediction,greedy,top_token"
ROW = "chat,1,yes,-0.100000,-3.000000,-4.000000,yes,yes,17"
FIRST = Prediction("chat", "1", "yes", (-0.1, -3.0, -4.0), "yes", "yes", 17)
OTHERS = [
    Prediction("chat", "22", "no", (-2.5, -0.2, -3.25), "no", "unparsable", 3),
    FIRST._replace(protocol="lm_eval", greedy=""),
]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_table_is_read_as_it_was_written_in_the_order_of_pmids(tmp_path: Path):
    write_predictions(tmp_path / "p.csv", [*OTHERS, FIRST])
    assert (tmp_path / "p.csv").read_text().splitlines()[::3] == [",".join(COLUMNS), ROW] == [HEADER, ROW]
    assert read_predictions(tmp_path / "p.csv") == {"chat": [FIRST, OTHERS[0]], "lm_eval": [OTHERS[1]]}


@pytest.mark.parametrize("pmid", ["a,b", 'a"b', "a\nb", "a\r\nb", " 7", "µ"])
def test_an_identifier_of_any_text_comes_back(tmp_path: Path, pmid: str):
    write_predictions(tmp_path / "p.csv", [FIRST._replace(pmid=pmid)])
    assert [row.pmid for row in read_predictions(tmp_path / "p.csv")["chat"]] == [pmid]


def test_a_header_alone_is_the_table_of_a_model_that_was_not_measured(tmp_path: Path):
    assert read_predictions(write(tmp_path / "p.csv", HEADER)) == {}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        # float32 rounds a logarithm of 1 to a little above 0, at most 0.001
        *((f"chat,7,yes,{x},-3,-4,yes,yes,1", "not a log-probability") for x in ("nan", "-inf", "0.9", "0.0011")),
        ("chat,7,yes,many,-3,-4,yes,yes,1", "many"),
        ("chat,7,Yes,-1,-3,-4,yes,yes,1", "unknown label"),
        ("chat,7,yes,-1,-3,-4,unparsable,yes,1", "unknown label"),
        ("chat,7,yes,-5,-3,-4,yes,yes,1", "not the most probable"),
        ("chat,7,yes,-1,-3,-4,yes,yes,x", "invalid literal"),
        ("letters,7,yes,-1,-3,-4,yes,yes,1", "unknown protocol"),
        ("chat,1,yes,-1,-3,-4,yes,yes,1", "duplicate under chat"),
        ("chat,7,yes,-1,-3,-4,yes", "expected 9 fields, got 7"),
        ("chat,7", "expected 9 fields, got 2"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_pmid(tmp_path: Path, line: str, problem: str):
    path = write(tmp_path / "p.csv", HEADER, ROW, line)
    with pytest.raises(Fail, match=problem) as failure:
        read_predictions(path)
    assert f"{path}, line 3 (PMID {line.split(',')[1]})" in str(failure.value)


@pytest.mark.parametrize("lines", [[], ["pmid,label", ROW], [ROW], [HEADER, "chat"], [f"{HEADER}\r", f'"{ROW}']])
def test_a_file_that_is_no_table_of_predictions_is_refused(tmp_path: Path, lines: list[str]):
    with pytest.raises(Fail, match=r"p\.csv"):
        read_predictions(write(tmp_path / "p.csv", *lines))
