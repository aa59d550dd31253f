"""Reading a decision off an answer's beginning, and summing probabilities."""

import math
from typing import Any

import numpy as np
import pytest

from pipeline.core.stage import Fail
from pipeline.scoring.measures import UNPARSABLE
from pipeline.scoring.scorer import Scorer, log_sum_exp, parse_decision, surface_forms


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


class Told(Scorer):
    """A scorer whose model writes these pieces, a token each, and then ends its turn."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = [piece.encode() for piece in pieces]
        self.fed: list[tuple[int, int]] = []  # token and position
        self.lib, self.vocab, self.context, self.n_ctx = self, None, None, 20

    def llama_vocab_is_eog(self, vocab: Any, token: int) -> bool:
        return token == len(self.pieces)

    def piece(self, token: int) -> bytes:
        return self.pieces[token]

    def llama_get_memory(self, context: Any) -> None:
        assert context is None

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        raise EOFError  # as far as these tests follow

    def decode(self, tokens: list[int], tails: list[list[int]], start: int) -> None:
        assert not tails
        self.fed += [(token, start + i) for i, token in enumerate(tokens)]

    def log_probabilities(self, index: int) -> Any:
        assert index == 0
        return self.after(self.fed[-1][0] + 1)

    def after(self, token: int) -> Any:
        """Log-probabilities of which this token's is the highest."""
        return np.where(np.arange(len(self.pieces) + 1) == token, -0.1, -5.0)


@pytest.mark.parametrize(
    ("pieces", "decision", "fed"),
    [
        (["Yes", ".", " It", " does"], "yes", 1),  # the full stop tells that the word is over
        (["No", ".", " It", " does"], "no", 1),
        (["May", "be", ".", " It"], "maybe", 2),
        (["Yes"], "yes", 1),  # so does the end of the turn
        (["No", "-", "one"], UNPARSABLE, 3),
        (["I", " think", " yes", "."], UNPARSABLE, 4),
        ([], UNPARSABLE, 0),
        (["Yes", "ter", "day", " it", " did", ","], UNPARSABLE, 5),
        (["It", " is", " so", ":", " so", " yes"], UNPARSABLE, 5),  # six tokens are asked for, and the last not fed
    ],
)
def test_the_greedy_answer_is_read_up_to_its_decision_and_is_unparsable_without_one(
    pieces: list[str], decision: str, fed: int
):
    scorer = Told(*pieces)
    assert scorer.greedy(scorer.after(0), position=10, max_new_tokens=6) == decision
    assert scorer.fed == [(token, 10 + token) for token in range(fed)]


def test_the_greedy_answer_needs_room_for_all_its_tokens_but_the_last():
    scorer = Told("No", ".")
    assert scorer.greedy(scorer.after(0), position=20, max_new_tokens=1) == "no"
    assert scorer.greedy(scorer.after(0), position=15, max_new_tokens=6) == "no"
    with pytest.raises(Fail, match=r"take 21 tokens: raise params\.yaml's evaluate\.n_ctx .*from 20"):
        scorer.greedy(scorer.after(0), position=16, max_new_tokens=6)


def test_a_question_needs_room_for_all_tokens_of_the_forms_but_their_last():
    scorer = Told("No", ".")
    choices = {"yes": [[1], [1, 2, 3]], "no": [[4, 5]], "maybe": [[6]]}  # three more than the prompt
    with pytest.raises(EOFError):
        scorer.score([0] * 17, choices)
    with pytest.raises(Fail, match="take 21 tokens"):
        scorer.score([0] * 18, choices)
