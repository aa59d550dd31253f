"""A question file and its list of test questions, examined once and completely."""

from pathlib import Path
from typing import NamedTuple

from pipeline.core.errors import Fail
from pipeline.core.json_files import read_json_object
from pipeline.core.labels import LABELS, Label
from pipeline.core.record import Record, parse_record

SHOWN = 50  # problems that one message lists; more are counted


class Dataset(NamedTuple):
    """Valid records by PMID, and the PMIDs of the test questions."""

    records: dict[str, Record]
    test: set[str]


def read_dataset(records: Path, truth: Path, records_name: str, truth_name: str) -> Dataset:
    """The records and the test questions of two files in PubMedQA's schema.

    Raises `Fail` listing all problems with their PMIDs. The names are those of the user's files, for the message.
    """
    values, gold = read_json_object(records, records_name), read_json_object(truth, truth_name)
    found: list[str] = []
    valid: dict[str, Record] = {}
    for pmid, value in values.items():
        record, problems = parse_record(pmid, value)
        found += problems
        if record:
            valid[pmid] = record
    found += duplicates(valid)
    found += split_groups(valid, set(gold))
    for pmid, label in gold.items():
        if label not in LABELS:
            found.append(f"{pmid}: {truth_name} must say yes, no or maybe")
        elif pmid not in values:
            found.append(f"{pmid}: in {truth_name} but not in {records_name}")
        elif pmid in valid and valid[pmid].final_decision != label:
            found.append(f"{pmid}: its final_decision differs from {truth_name}")
    if not gold or len(gold) >= len(values):
        found.append(f"{truth_name} lists {len(gold)} of {len(values)} records; some must be left for training")
    fail_with(found, records_name)
    dataset = Dataset(valid, set(gold))
    fail_with(missing_labels(dataset), records_name)
    return dataset


def duplicates(records: dict[str, Record]) -> list[str]:
    """A problem for each record that has the same question and abstract as an earlier one."""
    found: list[str] = []
    first: dict[str, str] = {}
    for pmid, record in records.items():
        if (earlier := first.setdefault(record.words, pmid)) != pmid:
            found.append(f"{pmid}: duplicate of {earlier}, the same question and abstract")
    return found


def split_groups(records: dict[str, Record], test: set[str]) -> list[str]:
    """A problem for each record outside the test whose group is in the test too; groups can be patients: unnamed."""
    tested = {record.group: pmid for pmid, record in records.items() if record.group and pmid in test}
    return [
        f"{pmid}: of the same group as test question {tested[record.group]}"
        for pmid, record in records.items()
        if record.group in tested and pmid not in test
    ]


def missing_labels(dataset: Dataset) -> list[str]:
    """A problem for each label that no model could learn; a label that no question has is none."""
    test, training = set[Label](), set[Label]()
    for pmid, record in dataset.records.items():
        (test if pmid in dataset.test else training).add(record.final_decision)
    found = [
        f"no training question is answered {label!r}, some test questions are" for label in sorted(test - training)
    ]
    if len(training) == 1:
        found.append(f"all training questions are answered {min(training)!r}; at least two answers are needed")
    return found


def fail_with(found: list[str], source: str) -> None:
    """Raise `Fail` listing the problems in `source`, unless there is none."""
    if found:
        rest = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        raise Fail(f"{source}: {count}: {'; '.join(found[:SHOWN])}{rest}. Correct the file, then run `dvc repro`")
