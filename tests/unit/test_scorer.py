"""Scoring without a model: a decision at an answer's beginning, label forms after the prompt, room in the context."""

from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import Fail
from pipeline.scoring.predictions import UNPARSABLE
from pipeline.scoring.protocols import PROTOCOLS
from pipeline.scoring.scorer import Scorer, TooLong, number, parse_decision

DECISIONS = {
    "yes": ["Yes.", " yes", "YES, it does", "yes no"],
    "no": ["\n\nNo. It does not", "**No**"],
    "maybe": ['"maybe,', "Maybe"],
    None: ["", " ", "Yesterday", "No-one knows", "no_", "Not at all", "None", "Maybes", "I think yes", "1. yes", "Oui"],
}


@pytest.mark.parametrize(("text", "decision"), [(text, label) for label in DECISIONS for text in DECISIONS[label]])
def test_an_answer_s_decision_is_its_first_word_or_none(text: str, decision: str | None):
    assert parse_decision(text, finished=True) == decision


@pytest.mark.parametrize(
    ("text", "decision"), [("No", None), ("No.", "no"), ("No ", "no"), ("No-", None), ("Yes\n", "yes")]
)
def test_an_unfinished_word_may_go_on(text: str, decision: str | None):
    assert parse_decision(text, finished=False) == decision


@pytest.mark.parametrize("value", ["", "-1", "1.5", "many", "²", "9" * 20])
def test_a_number_in_the_environment_has_to_be_a_whole_one(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("N_THREADS", "12")
    assert number("N_THREADS", 5) == 12
    monkeypatch.setenv("N_THREADS", value)
    with pytest.raises(Fail, match="N_THREADS"):
        number("N_THREADS", 5)


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

    def logits(self, index: int) -> Any:
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


def test_an_answer_needs_room_for_all_its_tokens_but_the_last():
    scorer = Told("No", ".")
    assert scorer.greedy(scorer.after(0), position=15, max_new_tokens=6) == "no"
    with pytest.raises(TooLong, match="21 tokens"):
        scorer.greedy(scorer.after(0), position=16, max_new_tokens=6)


def test_a_question_needs_room_for_all_tokens_of_the_forms_but_their_last():
    choices: Any = {"yes": [[1], [1, 2, 3]], "no": [[4, 5]], "maybe": [[6]]}  # three more than the prompt
    with pytest.raises(EOFError):
        Told().score([0] * 17, choices)
    with pytest.raises(TooLong, match="21 tokens"):
        Told().score([0] * 18, choices)


class Letters(Scorer):
    """A scorer with a token for each letter, and others for what stands in `joined`; BOS is 0."""

    def __init__(self, *joined: str) -> None:
        self.joined = joined

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        ids = [0] if add_special else []
        while text:
            size = next((len(part) for part in self.joined if text.startswith(part)), 1)
            ids.append(sum(map(ord, text[:size])))
            text = text[size:]
        return ids


def test_a_label_s_forms_are_what_is_longer_than_the_prompt():
    tokens, choices = Letters("yes", "no", "maybe").encode("Answer:", PROTOCOLS["lm_eval"])
    assert tokens == [0, *map(ord, "Answer:")]
    assert choices["yes"] == [[ord(" "), sum(map(ord, "yes"))]]


def test_a_form_that_the_tokenizer_joins_with_the_prompt_is_refused():
    with pytest.raises(Fail, match="joins 'no' with the end of the prompt"):
        Letters(": no").encode("Answer:", PROTOCOLS["lm_eval"])
