"""Reading a decision off an answer's beginning, and summing probabilities."""

import math

import pytest

from pipeline.scoring import log_sum_exp, parse_decision, surface_forms


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("Yes.", "yes"),
        (" yes", "yes"),
        ("YES, it does", "yes"),
        ("\n\nNo. It does not", "no"),
        ("**No**", "no"),
        ('"maybe,', "maybe"),
        ("Maybe", "maybe"),
        ("yes no", "yes"),
        ("", None),
        (" ", None),
        ("Yesterday", None),
        ("No-one knows", None),
        ("no_", None),
        ("Not at all", None),
        ("None", None),
        ("Maybes", None),
        ("I think yes", None),
        ("The answer is no", None),
        ("1. yes", None),
        ("Oui", None),
    ],
)
def test_parse_decision(text: str, decision: str | None):
    assert parse_decision(text, finished=True) == decision


@pytest.mark.parametrize(
    ("text", "decision"), [("No", None), ("No.", "no"), ("No ", "no"), ("No-", None), ("Yes\n", "yes")]
)
def test_an_unfinished_word_may_go_on(text: str, decision: str | None):
    assert parse_decision(text, finished=False) == decision


def test_surface_forms():
    assert surface_forms("maybe") == ["maybe", "Maybe"]


def test_log_sum_exp():
    assert log_sum_exp([math.log(0.25), math.log(0.5)]) == pytest.approx(math.log(0.75))
    assert log_sum_exp([-2000.0, -2000.0]) == pytest.approx(-2000 + math.log(2))
