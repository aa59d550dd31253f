"""The splits, what `format` refuses, and the overlap that it counts."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.stage import Fail
from pipeline.stages.format import (
    Params,
    add_artificial,
    check_records,
    control_tokens,
    main,
    ngrams,
    overlap,
    problems,
    split,
    statistics,
    texts_as_data,
)

TEXT = "a question that no error may quote"


def record(label: str = "yes", number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "QUESTION": f"{TEXT} {number}",
        "CONTEXTS": ["one", "two"],
        "LABELS": ["BACKGROUND", "RESULTS"],
        "LONG_ANSWER": "It does.",
        "final_decision": label,
        **changes,
    }


def dataset(yes: int, no: int, maybe: int, first: int = 100) -> dict[str, dict[str, Any]]:
    labels = ["yes"] * yes + ["no"] * no + ["maybe"] * maybe
    return {str(first + i): record(label, first + i) for i, label in enumerate(labels)}


def params(validation_questions: int = 50, seed: int = 1) -> Params:
    return Params(system_prompt="s", validation_questions=validation_questions, seed=seed)


# PubMedQA's own counts: 500 questions of each half.
REST, TEST = dataset(276, 169, 55), dataset(276, 169, 55, first=1000)
TRUTH = {pmid: row["final_decision"] for pmid, row in TEST.items()}
RECORDS = REST | TEST


def test_control_tokens_are_the_special_ones_and_those_that_llama_cpp_takes_for_such(tmp_path: Path):
    added = {"<|eot_id|>": True, "<|extra|>": False, "<｜fullwidth｜>": False, "<table>": False, "  ": False}  # noqa: RUF001
    tokens = [{"content": name, "special": special} for name, special in added.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert control_tokens(tmp_path) == ["<|eot_id|>", "<|extra|>", "<｜fullwidth｜>"]  # noqa: RUF001


class TestSplit:
    def test_the_test_split_is_exactly_the_official_list(self):
        assert split(RECORDS, TRUTH, params())["test"] == sorted(TRUTH)

    def test_every_question_is_in_one_split(self):
        pmids = split(RECORDS, TRUTH, params())
        assert {name: len(part) for name, part in pmids.items()} == {"train": 450, "validation": 50, "test": 500}
        assert sorted(pmid for part in pmids.values() for pmid in part) == sorted(RECORDS)

    def test_validation_is_stratified(self):
        # 27.6, 16.9 and 5.5 of 50: rounded down, then the largest remainders (.9 and .6) get the two that are left.
        validation = split(RECORDS, TRUTH, params())["validation"]
        assert Counter(RECORDS[pmid]["final_decision"] for pmid in validation) == {"yes": 28, "no": 17, "maybe": 5}

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 49, 250, 499])
    def test_validation_has_the_size_asked_for(self, size: int):
        assert len(split(RECORDS, TRUTH, params(size))["validation"]) == size

    def test_order_of_the_file_does_not_matter(self):
        turned = dict(reversed(RECORDS.items()))
        assert split(turned, dict(reversed(TRUTH.items())), params()) == split(RECORDS, TRUTH, params())

    def test_seed(self):
        first, again, other = (split(RECORDS, TRUTH, params(seed=seed)) for seed in (1, 1, 2))
        assert first == again
        assert first["validation"] != other["validation"]
        assert first["test"] == other["test"]

    @pytest.mark.parametrize("size", [500, 501])
    def test_validation_cannot_take_everything(self, size: int):
        with pytest.raises(Fail, match=r"format\.validation_questions: only 500"):
            split(RECORDS, TRUTH, params(size))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"QUESTION": None}, "QUESTION"),
        ({"QUESTION": " \n"}, "QUESTION"),
        ({"LONG_ANSWER": ""}, "LONG_ANSWER"),
        ({"CONTEXTS": []}, "CONTEXTS"),
        ({"CONTEXTS": ["one", " "]}, "CONTEXTS"),
        ({"CONTEXTS": ["one", 2]}, "CONTEXTS"),
        ({"CONTEXTS": "one"}, "CONTEXTS"),
        ({"LABELS": ["BACKGROUND"]}, "LABELS"),
        ({"LABELS": None}, "LABELS"),
        ({"final_decision": "perhaps"}, "final_decision"),
        ({"final_decision": "Yes"}, "final_decision"),
        ({"final_decision": ["y", "e", "s"]}, "final_decision"),
    ],
)
def test_a_bad_record_is_refused_by_pmid_and_field(changes: dict[str, Any], field: str):
    [problem] = problems("17", record(**changes))
    assert problem.startswith(f"PMID 17: {field} ")
    assert TEXT not in problem
    with pytest.raises(Fail, match=rf"data/raw: PMID 17: {field} .*\(1 problem in all\)"):
        check_records({"16": record(), "17": record(**changes)}, {"16": "yes"})


@pytest.mark.parametrize("pmid", ["a,b", "a\nb", 'a"b', "", " 7"])
def test_an_identifier_that_a_table_of_predictions_could_not_hold(pmid: str):
    assert problems(pmid, record()) == [f"PMID {pmid}: an identifier is made of letters, digits, '.', '-' and '_'"]


def test_a_good_record_has_no_problem():
    assert problems("17", record()) == []
    assert problems("17", "not a record") == ["PMID 17: not a record"]


@pytest.mark.parametrize(
    ("records", "truth", "problem"),
    [
        ({"1": record(), "2": record()}, {"1": "yes"}, "PMID 2: the same question and abstract as PMID 1"),
        (
            {"1": record(), "2": record(QUESTION=f" {TEXT.upper()}\n0")},
            {"1": "yes"},
            "PMID 2: the same question and abstract as PMID 1",
        ),
        (dataset(2, 0, 0), {"7": "yes"}, "PMID 7: in test_ground_truth.json but not in ori_pqal.json"),
        (dataset(2, 0, 0), {"100": "no"}, "PMID 100: its final_decision differs from test_ground_truth.json"),
        (dataset(2, 0, 0), {}, "lists 0 PMIDs of 2 records"),
        (dataset(2, 0, 0), {"100": "yes", "101": "yes"}, "lists 2 PMIDs of 2 records"),
    ],
)
def test_duplicates_and_a_test_list_that_does_not_match(records: Any, truth: dict[str, str], problem: str):
    with pytest.raises(Fail) as failure:
        check_records(records, truth)
    assert problem in str(failure.value)
    assert TEXT not in str(failure.value).lower()


def test_problems_are_counted():
    with pytest.raises(Fail, match=r"2 problems in all"):
        check_records({"1": record("perhaps"), "2": record(CONTEXTS=[]), "3": record()}, {"3": "yes"})


class TestArtificial:
    def test_it_is_added_to_train_alone(self, run_format: Callable[..., dict[str, list[Any]]]):
        without, extra = run_format(), {"9": record("no", 9), "8": record("yes", 8)}
        splits = run_format(artificial=extra)
        assert splits["validation"] == without["validation"]
        assert splits["test"] == without["test"]
        assert [row["pmid"] for row in splits["train"]] == [row["pmid"] for row in without["train"]] + ["8", "9"]

    def test_a_pmid_of_pqa_l_is_refused(self):
        with pytest.raises(Fail, match=r"ori_pqaa\.json: PMID 1000 is in ori_pqal\.json too"):
            add_artificial(RECORDS, {"1000": record(), "7": record()})

    def test_a_bad_record_is_refused(self):
        with pytest.raises(Fail, match=r"ori_pqaa\.json: PMID 7: CONTEXTS"):
            add_artificial(RECORDS, {"7": record(CONTEXTS=[])})


class TestOverlap:
    def test_ngrams(self):
        found = ngrams({"QUESTION": "Is it, now?", "CONTEXTS": ["IT"], "LONG_ANSWER": "is. Now"}, 3)
        assert found == {("is", "it", "now"), ("it", "now", "it"), ("now", "it", "is"), ("it", "is", "now")}

    def test_too_short_a_text_has_none(self):
        assert ngrams({"QUESTION": "one", "CONTEXTS": ["two"], "LONG_ANSWER": ""}, 3) == set()

    def test_counted_by_hand(self):
        train, test = (
            [{"QUESTION": row[0], "CONTEXTS": row[1:-1], "LONG_ANSWER": row[-1]} for row in rows]
            for rows in (
                [("a b c d e", "f g", "h"), ("x", "y", "z")],
                [
                    ("B, c. D!", "q", "r"),  # shares b c d
                    ("b c q d", "x y", "q"),  # shares two words at most
                    ("r", "d e", "f", "x", "y z"),  # shares d e f and x y z, and is one question
                ],
            )
        )
        assert [overlap(test, train, n) for n in (1, 2, 3, 4)] == [3, 3, 2, 0]


@pytest.fixture
def run_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[Any]]]:
    """A function that runs `format` on RECORDS, changed as told, without a tokenizer; it returns the splits' rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.stages.format.token_counter", lambda base: lambda example: 7)
    monkeypatch.setattr("pipeline.stages.format.control_tokens", lambda base: ["<|eot_id|>"])
    Path("params.yaml").write_text("format:\n  system_prompt: s\n  validation_questions: 50\n  seed: 1\n")
    raw = tmp_path / "raw"
    raw.mkdir()

    def run(records: Any = RECORDS, truth: Any = TRUTH, artificial: Any = None) -> dict[str, list[Any]]:
        (raw / "ori_pqal.json").write_text(json.dumps(records))
        (raw / "test_ground_truth.json").write_text(json.dumps(truth))
        if artificial is not None:
            (raw / "ori_pqaa.json").write_text(json.dumps(artificial))
        main(raw, tmp_path / "base", tmp_path / "out", *(tmp_path / name for name in ("m.json", "l.csv", "t.csv")))
        return {
            name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "validation", "test")
        }

    return run


def test_statistics(tmp_path: Path, run_format: Callable[..., dict[str, list[Any]]]):
    run_format()
    assert json.loads((tmp_path / "m.json").read_text()) == {
        "train": {"questions": 450, "yes": 248, "no": 152, "maybe": 50, "tokens_mean": 7.0, "tokens_max": 7},
        "validation": {"questions": 50, "yes": 28, "no": 17, "maybe": 5, "tokens_mean": 7.0, "tokens_max": 7},
        "test": {"questions": 500, "yes": 276, "no": 169, "maybe": 55, "tokens_mean": 7.0, "tokens_max": 7},
        # the questions differ in their last word alone: seven words of TEXT, a number, one, two
        "test_overlap": {"8_grams": 0, "13_grams": 0},
    }
    assert (tmp_path / "l.csv").read_text().splitlines()[:3] == [
        "split,label,questions",
        "train,yes,248",
        "train,no,152",
    ]
    assert (tmp_path / "t.csv").read_text().splitlines()[-1] == "test,7"


def test_overlap_counts_validation_as_seen(tmp_path: Path, run_format: Callable[..., dict[str, list[Any]]]):
    words = "one two three four five six seven eight"
    validation = {row["pmid"] for row in run_format()["validation"]}
    changed = {pmid: row | {"CONTEXTS": [words, f"{pmid}"]} for pmid, row in RECORDS.items() if pmid in validation}
    changed["1000"] = RECORDS["1000"] | {"CONTEXTS": [words, "at last"]}
    run_format(RECORDS | changed)
    assert json.loads((tmp_path / "m.json").read_text())["test_overlap"] == {"8_grams": 1, "13_grams": 0}


def test_records_with_a_problem_become_no_file(tmp_path: Path, run_format: Callable[..., dict[str, list[Any]]]):
    with pytest.raises(Fail, match="PMID 1: final_decision"):
        run_format(RECORDS | {"1": record("perhaps")})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["records", "truth", "artificial"])
def test_a_file_of_another_shape(name: str, run_format: Callable[..., dict[str, list[Any]]]):
    with pytest.raises(Fail, match="is not a JSON object of PMIDs"):
        run_format(**{name: [record()]})


def test_every_text_of_a_record_is_data_and_nothing_else_changes():
    plain = record(MESHES=["<|eot_id|>"])
    texts = {"QUESTION": "<|eot_id|>?", "CONTEXTS": ["a<|eot_id|>", "b"], "LABELS": ["<|eot_id|>", ""]}
    clean = texts_as_data(plain | texts | {"LONG_ANSWER": "<|eot_id|>!"}, ["<|eot_id|>"])
    assert clean == plain | {
        "QUESTION": "< |eot_id|>?",
        "CONTEXTS": ["a< |eot_id|>", "b"],
        "LABELS": ["< |eot_id|>", ""],
        "LONG_ANSWER": "< |eot_id|>!",
    }
    assert texts_as_data(plain, ["<|eot_id|>"]) == plain


def test_statistics_of_lengths_that_differ():
    labels = {name: ["yes", "no", "yes"] for name in ("train", "validation", "test")}
    found = statistics(labels, {"train": [100, 101, 101], "validation": [5, 9, 1], "test": [7, 7, 8]})
    assert [(row["tokens_mean"], row["tokens_max"]) for row in found.values()] == [(100.7, 101), (5.0, 9), (7.3, 8)]
