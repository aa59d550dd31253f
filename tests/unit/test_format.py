"""The splits, what `format` refuses, the overlap that it counts, and the examples and questions that it writes."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.facts import QuestionFacts
from pipeline.core.files import read_rows
from pipeline.core.labels import Label
from pipeline.core.question import Question
from pipeline.core.record import Record
from pipeline.core.source import Source
from pipeline.models.directory import TINY_BASE
from pipeline.scoring.examples import ngrams, without_control_tokens
from pipeline.sections.format import Format
from pipeline.stages.baseline import words
from pipeline.stages.format import (
    check_lengths,
    facts_of,
    main,
    overlap,
    split,
)
from tests.conftest import ROOT, yaml

TEXT = "one question of seven words or more"
SOURCE = Source(simulated=False, name="", licence="", dataset="", records="mine.json", test_ground_truth="test.json")


def record(label: Label = "yes", number: int = 0, **changes: Any) -> Record:
    values = {"question": f"{TEXT} {number}", "contexts": ["one", "two"], "labels": ["AIM", "RESULTS"]}
    return Record.model_validate(values | {"long_answer": "It does.", "final_decision": label} | changes)


def dataset(yes: int, no: int, maybe: int, first: int = 100) -> dict[str, Record]:
    labels: list[Label] = [*["yes"] * yes, *["no"] * no, *["maybe"] * maybe]  # pyright: ignore
    return {str(first + i): record(label, first + i) for i, label in enumerate(labels)}


def params(validation_questions: int = 50, seed: int = 1) -> Format:
    return Format(system_prompt="s", validation_questions=validation_questions, seed=seed)


# PubMedQA's own counts: 500 questions of each half.
TEST = dataset(276, 169, 55, first=1000)
RECORDS = dataset(276, 169, 55) | TEST


class TestSplit:
    def test_the_test_split_is_the_authors_list_and_every_question_is_in_one_split(self):
        pmids = split(RECORDS, set(TEST), params())
        assert (len(pmids["train"]), len(pmids["validation"]), pmids["test"]) == (450, 50, sorted(TEST))
        assert sorted(pmid for part in pmids.values() for pmid in part) == sorted(RECORDS)

    def test_validation_is_stratified(self):
        # 27.6, 16.9 and 5.5 of 50: rounded down, then the largest remainders (.9 and .6) get the two that are left.
        validation = split(RECORDS, set(TEST), params())["validation"]
        assert Counter(RECORDS[pmid].final_decision for pmid in validation) == {"yes": 28, "no": 17, "maybe": 5}

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 49, 250, 499])
    def test_validation_has_the_size_asked_for(self, size: int):
        assert len(split(RECORDS, set(TEST), params(size))["validation"]) == size

    def test_the_seed_draws_validation_and_neither_test_nor_the_order_of_the_file_matters(self):
        first, turned = (split(rows, set(TEST), params()) for rows in (RECORDS, dict(reversed(RECORDS.items()))))
        other = split(RECORDS, set(TEST), params(seed=2))
        assert turned == first
        assert (first["validation"] != other["validation"], first["test"] == other["test"]) == (True, True)

    @pytest.mark.parametrize("size", [500, 501])
    def test_validation_cannot_take_everything(self, size: int):
        with pytest.raises(Fail, match=r"format\.validation_questions: only 500"):
            split(RECORDS, set(TEST), params(size))

    def test_validation_has_whole_groups_and_about_the_shares_of_answers(self):
        groups = {pmid: f"patient {i // 3}" for i, pmid in enumerate(random.Random(0).sample(sorted(RECORDS), 1000))}
        groups |= {pmid: None for i, pmid in enumerate(groups) if i % 5 == 0}  # these are on their own
        records = {pmid: row.model_copy(update={"group": groups[pmid]}) for pmid, row in RECORDS.items()}
        pmids = split(records, set(TEST), params())
        assert len(pmids["train"]) + len(pmids["validation"]) == 500
        of_train, of_validation = ({groups[pmid] for pmid in pmids[name]} - {None} for name in ("train", "validation"))
        assert (of_train & of_validation, len(of_validation) > 5) == (set(), True)
        counts = Counter(RECORDS[pmid].final_decision for pmid in pmids["validation"])
        assert counts <= Counter(yes=28, no=17, maybe=5)
        assert counts.total() >= 45
        assert split(records, set(TEST), params()) == pmids
        assert split(records, set(TEST), params(seed=2)) != pmids

    def test_groups_that_are_too_large_for_validation_are_named(self):
        records = {pmid: row.model_copy(update={"group": "all"}) for pmid, row in RECORDS.items() if pmid not in TEST}
        with pytest.raises(Fail, match=r"format\.validation_questions: no group of questions is as small as 50"):
            split(records, set(), params())


class TestOverlap:
    def test_ngrams_are_lower_cased_words(self):
        found = ngrams(["Is it, now?", "IT", "is. Now"], 3)
        assert found == {("is", "it", "now"), ("it", "now", "it"), ("now", "it", "is"), ("it", "is", "now")}

    def test_a_test_record_is_counted_once(self):
        train, test = (
            [record(question=row[0], contexts=[*row[1:-1]], long_answer=row[-1]) for row in rows]
            for rows in (
                [("a b c d e", "f g", "h"), ("x", "y", "z")],
                [
                    ("B, c. D!", "q", "r"),  # shares b c d
                    ("b c q d", "x y", "q"),  # shares two words at most
                    ("r", "d e", "f", "x", "y z"),  # shares d e f and x y z
                ],
            )
        )
        assert [overlap(test, train, n) for n in (1, 2, 3, 4)] == [3, 3, 2, 0]


def test_control_tokens_in_any_text_of_a_record_are_data_and_nothing_else_changes():
    changes = {"question": "<|eot_id|>?", "contexts": ["a<|eot_id|>", "b"], "labels": ["<|eot_id|>", ""]}
    marked = record(**changes, long_answer="<|eot_id|>!")
    assert without_control_tokens(marked, ["<|eot_id|>"]) == record(
        question="< |eot_id|>?",
        contexts=["a< |eot_id|>", "b"],
        labels=["< |eot_id|>", ""],
        long_answer="< |eot_id|>!",
    )
    assert without_control_tokens(record(), ["<|eot_id|>"]) == record()


def example(pmid: str, tokens: int, prompt: int = 1) -> Example:
    return Example(pmid=pmid, label="yes", text="", input_ids=[0] * tokens, prompt_tokens=prompt)


@pytest.fixture
def _micro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(TINY_BASE)
    params = yaml.load((ROOT / "profiles/micro.yaml").read_text())
    params["format"]["validation_questions"] = 4
    with Path("params.yaml").open("w") as file:
        yaml.dump(params, file)


@pytest.mark.usefixtures("_micro")
def test_every_limit_that_a_question_exceeds_is_named_before_anything_is_trained():
    fits = {"train": [example("1", 1024)], "validation": [example("2", 9)], "test": [example("3", 2000, prompt=2033)]}
    check_lengths(fits, Path("base"))
    long = {
        "train": [example("1", 3000)],
        "validation": [example("2", 1025, prompt=2050)],
        "test": [example("3", 9, prompt=2042)],
    }
    params = yaml.load(Path("params.yaml").read_text())
    params["reference"] = {"enabled": True, "n_ctx": 64, "max_new_tokens": 1}
    with Path("params.yaml").open("w") as file:
        yaml.dump(params, file)
    with pytest.raises(Fail) as failure:
        check_lengths(long, Path("base"))
    words = ["train.max_length is 1024 tokens and 2 questions need up to 3000 (PMID 1, 2)", "evaluate.n_ctx is 2048"]
    words += ["reference.n_ctx is 64 tokens and 1 questions need up to 2042 (PMID 3)", "generate.n_ctx is 2048"]
    assert [
        word for word in [*words, "need up to 2050 (PMID 2, 3)", "context is 2048"] if word not in str(failure.value)
    ] == []


Run = Callable[..., Path]


@pytest.fixture
def run_format(tmp_path: Path, _micro: None) -> Run:
    """A function that runs `format` for the tiny base on 24 records, changed as told; it returns the directory."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "source.json").write_text(SOURCE.model_dump_json())
    records = dataset(6, 4, 2) | dataset(6, 4, 2, first=1000)
    test = {pmid: row.final_decision for pmid, row in records.items() if len(pmid) == 4}

    def run(truth: Any = test, **changes: Record) -> Path:
        values = {pmid: row.model_dump(by_alias=True) for pmid, row in (records | changes).items()}
        (tmp_path / "raw" / "ori_pqal.json").write_text(json.dumps(values))
        (tmp_path / "raw" / "test_ground_truth.json").write_text(json.dumps(truth))
        main(*(tmp_path / name for name in ("raw", "base", "out", "m.json", "l.csv", "t.csv")))
        return tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("text", "numeric"),
    [
        *(("in 12 % of them", True), ("12%", True), ("a mean of 1.5", True), ("1·5", True), ("P < .05", True)),
        *(("p=0", True), ("3 ± 1", True), ("All 120 patients of 2 groups.", False), ("See map = 3", False)),
    ],
)
def test_facts_are_year_length_and_whether_results_are_numbers(text: str, numeric: bool):
    found = facts_of("7", record(contexts=["two words", text], year="1999"))
    assert found == QuestionFacts(pmid="7", year=1999, abstract_words=2 + len(text.split()), numeric_results=numeric)
    assert facts_of("7", record()).year is None


def test_files_and_figures_are_of_the_same_questions(tmp_path: Path, run_format: Run):
    out = run_format()
    train, validation = (read_rows(out / f"{name}.jsonl", Example) for name in ("train", "validation"))
    assert (len(train), len(validation)) == (8, 4)
    assert [row.pmid for row in read_rows(out / "test.jsonl", Question)] == [str(1000 + i) for i in range(12)]
    assert [row.pmid for row in read_rows(out / "test_facts.jsonl", QuestionFacts)] == [
        str(1000 + i) for i in range(12)
    ]
    asked = read_rows(out / "validation_questions.jsonl", Question)
    assert [(row.pmid, row.label, words(row)) for row in asked] == [(r.pmid, r.label, r.text) for r in validation]
    figures, lengths = json.loads((tmp_path / "m.json").read_text()), [len(row.input_ids) for row in train]
    assert figures["train"]["tokens_max"] == max(lengths)
    assert figures["train"]["tokens_mean"] == round(sum(lengths) / 8, 1)
    assert figures["test"].items() >= {"questions": 12, "yes": 6, "no": 4, "maybe": 2}.items()
    assert (tmp_path / "t.csv").read_text().startswith(f"split,tokens\ntrain,{lengths[0]}\n")


def test_overlap_counts_validation_as_seen(tmp_path: Path, run_format: Run):
    pmid = read_rows(run_format() / "validation.jsonl", Example)[0].pmid
    words = "one two three four five six seven eight"
    label = dataset(6, 4, 2)[pmid].final_decision
    seen, asked = record(label, 1, contexts=[words, "x"]), record("yes", 2, contexts=[words, "y"])
    run_format(**{pmid: seen, "1000": asked})
    assert json.loads((tmp_path / "m.json").read_text())["test_overlap"] == {"8_grams": 1, "13_grams": 0}


def test_data_with_a_problem_become_no_file(tmp_path: Path, run_format: Run):
    with pytest.raises(Fail, match=r"^mine\.json: 1 problem: 9: in test\.json"):
        run_format(truth={"9": "yes"} | dict.fromkeys(("1000", "1001"), "yes"))
    assert not (tmp_path / "out").exists()
