"""The figures of written answers: ROUGE-L without the decision, and whether answers are whole."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Fail
from pipeline.core.facts import Conclusion
from pipeline.core.question import Question
from pipeline.reporting.answers import measured_answers, without_decision
from pipeline.scoring.answers import Answer
from pipeline.sections.generate import Generate
from pipeline.stages import generate
from pipeline.stages.generate import parse_line
from tests.tables import REPORT

GOLD = [Conclusion(pmid=str(number), long_answer="Pain fell with belacine.") for number in range(4)]


def answers(model: Any, *texts: str, ended: bool = True) -> list[Answer]:
    return [Answer(model=model, pmid=str(i), text=text, tokens=3 * i, ended=ended) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Yes. Pain fell.", "Pain fell."),
        ("**no**: it did not", "it did not"),
        ("Maybe", ""),
        ("No-one knows.", "No-one knows."),
        ("Pain fell. Yes.", "Pain fell. Yes."),
    ],
)
def test_a_decision_in_front_is_not_compared(text: str, left: str):
    assert without_decision(text) == left


def test_overlap_and_shares_are_those_counted_by_hand():
    tuned = answers(
        "tuned", "Yes. Pain fell with belacine.", "No. Pain rose with it.", "Maybe.", 'He said "pain fell."'
    )
    base = answers("base", "Pain fell with belacine.", "pain", "", "Pain fell with", ended=False)
    found = measured_answers([*base, *tuned], GOLD, REPORT)
    assert found
    # Longest common subsequences of 4, 2, 0 and 2 words; F = 2 LCS / (words of both): 1, 4/8, 0 and 4/8.
    assert found.tuned.rouge_l.value == pytest.approx((1 + 1 / 2 + 0 + 1 / 2) / 4)
    assert found.base.rouge_l.value == pytest.approx((1 + 2 / 5 + 0 + 6 / 7) / 4)
    low, high = found.tuned.rouge_l.low, found.tuned.rouge_l.high  # 0.5 -+ 1.96 * sqrt(1/6) / 2
    assert (low, high) == pytest.approx((0.5 - 0.4001, 0.5 + 0.4001), abs=1e-4)
    assert found.tuned_minus_base.value == pytest.approx(found.tuned.rouge_l.value - found.base.rouge_l.value)
    assert (found.tuned.ended, found.tuned.whole, found.tuned.tokens) == (1, 1, 4.5)
    assert (found.base.ended, found.base.whole) == (0, 0)  # a full stop at the limit of tokens is luck


def test_the_interval_of_one_question_has_no_width():
    found = measured_answers([*answers("tuned", "Yes. Pain fell"), *answers("base", "No")], GOLD[:1], REPORT)
    assert found
    for interval in (found.tuned.rouge_l, found.base.rouge_l, found.tuned_minus_base):
        assert interval.low == interval.value == interval.high


def test_an_ended_answer_without_a_full_stop_is_not_whole():
    rows = [*answers("tuned", "Yes", "Yes.", "It fell", "It fell (P=0.03)."), *answers("base", "a", "b", "c", "d")]
    found = measured_answers(rows, GOLD, REPORT)
    assert found
    assert (found.tuned.ended, found.tuned.whole, found.base.whole) == (1, 0.5, 0)


def test_no_answers_give_no_figures_and_a_missing_one_is_refused():
    assert measured_answers([], GOLD, REPORT) is None
    rows = [*answers("tuned", *"abcd"), *answers("base", *"abc")]
    for wrong in (rows, [*rows, rows[0]]):
        with pytest.raises(Fail, match="dvc repro -f generate"):
            measured_answers(wrong, GOLD, REPORT)


ROW = answers("tuned", "Yes.\r\n\u2028Pain")[0]
LINE = ROW.model_dump_json().encode()


def question(pmid: str) -> Question:
    return Question(pmid=pmid, label="yes", system_prompt="", question="?", contexts=[], labels=[])


@pytest.mark.parametrize(
    ("line", "model", "pmid", "problem"),
    [
        (LINE, "base", "0", "another question"),
        (LINE, "tuned", "1", "another question"),
        *((line, "tuned", "0", "validation error") for line in (b"", b"[1]", b"\0\0", LINE[:-2])),
    ],
)
def test_a_line_of_the_journal_counts_only_as_an_answer_to_what_was_asked(
    line: bytes, model: Any, pmid: str, problem: str
):
    assert parse_line(LINE, ("tuned", question("0"))) == ROW
    with pytest.raises(ValueError, match=problem):
        parse_line(line, (model, question(pmid)))


def test_answers_are_written_with_the_type_of_keys_and_values_that_is_given(monkeypatch: pytest.MonkeyPatch):
    def load(gguf: Path, n_ctx: int, remedy: str, cache_type: str) -> None:
        raise EOFError(gguf.name, n_ctx, cache_type)  # as far as this test follows

    monkeypatch.setattr(generate, "Scorer", load)
    params = Generate(enabled=True, n_ctx=64, max_new_tokens=1)
    with pytest.raises(EOFError) as told:
        next(generate.write_answers(Path("a.gguf"), "tuned", [question("0")], params, "q8_0"))
    assert told.value.args == ("a.gguf", 64, "q8_0")
