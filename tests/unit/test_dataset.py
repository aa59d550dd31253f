"""A question file and its test list: every problem is listed with its PMID, and no text of a question is quoted."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.dataset import SHOWN, fail_with, read_dataset
from pipeline.core.errors import Fail
from pipeline.core.record import Record, parse_record

SECRET = "a question that no error may quote"
FIELDS = ["QUESTION", "CONTEXTS", "LABELS", "LONG_ANSWER", "final_decision", "YEAR"]
GOOD: dict[str, Any] = dict(zip(FIELDS, [SECRET, ["one", "two"], ["AIM", ""], "It does.", "yes", "2011"], strict=True))
GOOD |= {"MESHES": ["ignored"], "reasoning_required_pred": "ignored"}


def row(number: int, decision: str = "yes") -> dict[str, Any]:
    return GOOD | {"QUESTION": f"{SECRET} {number}", "final_decision": decision}


VALUES = {"1": row(1), "2": row(2, "no"), "3": row(3), "4": row(4, "no")}
TRUTH = {"3": "yes", "4": "no"}


def test_a_record_keeps_what_the_pipeline_reads_and_no_more():
    record, problems = parse_record("17", GOOD)
    assert record
    assert (list(record.model_dump(by_alias=True)), problems) == ([*FIELDS, "group"], [])


@pytest.mark.parametrize(
    ("given", "year"), [("2011", 2011), (2011, 2011), (None, None), ("", None), ("in press", None), (20.5, None)]
)
def test_the_year_may_be_missing_or_unreadable(given: Any, year: int | None):
    record, problems = parse_record("17", GOOD | {"YEAR": given})
    assert record
    assert (record.year, problems) == (year, [])
    assert parse_record("17", {key: value for key, value in GOOD.items() if key != "YEAR"})[0]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("QUESTION", [None, " \n", "\ud800", 7]),
        ("LONG_ANSWER", [""]),
        ("CONTEXTS", [[], ["one", " "], ["one", 2], "one"]),
        ("LABELS", [["AIM"], None, ["\ud800", ""]]),
        ("final_decision", ["perhaps", "Yes", ["y", "e", "s"]]),
    ],
)
def test_a_problem_is_named_by_pmid_and_field(field: str, values: list[Any]):
    for value in values:
        record, [problem] = parse_record("17", GOOD | {field: value})
        assert (record, problem.startswith(f"17: {field}"), SECRET in problem) == (None, True, False)


@pytest.mark.parametrize(
    ("pmid", "value"), [("17", "not a record"), ("17", [GOOD]), ("", GOOD), (" ", GOOD), ("\ud800", GOOD)]
)
def test_what_is_no_record_or_has_no_identifier_is_refused(pmid: str, value: Any):
    record, problems = parse_record(pmid, value)
    assert (record, len(problems)) == (None, 1)


def test_words_are_equal_for_duplicates():
    other = GOOD | {"QUESTION": f" {SECRET.upper()}\n", "CONTEXTS": ["One  TWO"], "LABELS": ["X"], "LONG_ANSWER": "?"}
    assert Record.model_validate(other).words == Record.model_validate(GOOD).words


def read(directory: Path, values: Any, truth: Any) -> Any:
    names = "mine.json", "list.json"
    for name, value in zip(names, (values, truth), strict=True):
        (directory / name).write_text(json.dumps(value))
    return read_dataset(directory / "mine.json", directory / "list.json", *names)


def refusal(directory: Path, values: Any, truth: Any) -> str:
    with pytest.raises(Fail) as failure:
        read(directory, values, truth)
    assert SECRET not in str(failure.value).lower()
    return str(failure.value)


def test_the_test_questions_are_the_authors_list(tmp_path: Path):
    records, test = read(tmp_path, VALUES, TRUTH)
    assert (list(records), test) == (["1", "2", "3", "4"], {"3", "4"})


@pytest.mark.parametrize(
    ("values", "truth", "problem"),
    [
        (VALUES | {"5": row(1) | {"QUESTION": f"{SECRET.upper()}  1"}}, TRUTH, "5: duplicate of 1"),
        (
            VALUES | {pmid: row(int(pmid), VALUES[pmid]["final_decision"]) | {"group": "g"} for pmid in "13"},
            TRUTH,
            "1: of the same group as test question 3",
        ),
        (VALUES, TRUTH | {"7": "yes"}, "7: in list.json but not in mine.json"),
        (VALUES, TRUTH | {"4": "yes"}, "4: its final_decision differs from list.json"),
        (VALUES, TRUTH | {"4": ["no"]}, "4: list.json must say yes, no or maybe"),
        (VALUES, {}, "list.json lists 0 of 4 records"),
        (VALUES, {pmid: value["final_decision"] for pmid, value in VALUES.items()}, "list.json lists 4 of 4 records"),
        (VALUES | {"1": row(1, "no"), "5": row(5, "maybe")}, TRUTH, "no training question is answered 'yes'"),
        (VALUES | {"2": row(2), "4": row(4)}, {"3": "yes", "4": "yes"}, "all training questions are answered 'yes'"),
        ([GOOD], TRUTH, "mine.json must hold a JSON object"),
        (VALUES, ["3", "4"], "list.json must hold a JSON object"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path: Path, values: Any, truth: Any, problem: str):
    assert problem in refusal(tmp_path, values, truth)


def test_all_problems_of_both_files_are_listed_at_once(tmp_path: Path):
    bad = {"1": row(1) | {"CONTEXTS": []}, "2": row(2) | {"QUESTION": "", "final_decision": "x"}, "5": row(3)}
    said = refusal(tmp_path, VALUES | bad, TRUTH | {"9": "no", "3": "maybe"})
    expected = ["1: CONTEXTS", "2: QUESTION", "2: final_decision", "5: duplicate of 3", "9: in list", "3: its final"]
    assert [problem for problem in ("mine.json: 6 problems", *expected) if problem not in said] == []


@pytest.mark.parametrize("count", [1, SHOWN, SHOWN + 5])
def test_a_long_list_of_problems_is_cut_and_its_rest_counted(count: int):
    with pytest.raises(Fail) as failure:
        fail_with([f"PMID-{number}: is wrong" for number in range(count)], "mine.json")
    shown = str(failure.value).count("PMID-"), "and 5 more" in str(failure.value)
    assert shown == (min(count, SHOWN), count > SHOWN)
