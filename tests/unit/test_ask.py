"""What `ask` prints beside the answer: the metrics of the GGUF that it reads, and warnings; what `serve` refuses."""

import json
import math
from pathlib import Path

import pytest

from pipeline.commands import ask, serve
from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from tests.tables import write_gguf


@pytest.mark.parametrize(
    ("yes", "no", "maybe", "count"),
    [(0.9, 0.05, 0.01, 0), (0.4, 0.05, 0.01, 1), (0.5, 0.4, 0.05, 1), (0.2, 0.2, 0.01, 2)],
)
def test_an_answer_off_topic_or_without_two_to_one_odds_is_unsure(yes: float, no: float, maybe: float, count: int):
    assert len(ask.doubts({"yes": math.log(yes), "no": math.log(no), "maybe": math.log(maybe)})) == count


def test_the_labels_share_their_own_probability_and_the_likeliest_is_first():
    found = ask.shares({"yes": math.log(0.1), "no": math.log(0.2), "maybe": math.log(0.1)})
    assert list(found.items()) == [
        ("no", pytest.approx(0.5)),
        ("yes", pytest.approx(0.25)),
        ("maybe", pytest.approx(0.25)),
    ]


@pytest.mark.parametrize(("size", "same", "hashed"), [(5, True, 1), (5, False, 1), (6, True, 0)])
def test_figures_are_quoted_only_of_the_file_that_was_measured_and_another_size_is_not_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, same: bool, hashed: int
):
    (tmp_path / "model.gguf").write_bytes(b"model")
    digest = sha256(tmp_path / "model.gguf") if same else "0" * 64
    tuned = {"accuracy": {"value": 0.75}, "protocols": {"question_only": {"accuracy": {"value": 0.55}}}}
    about = {"bytes": size, "sha256": digest}
    compared = {"gguf": about, "simulated": True, "questions": 500, "tuned": tuned}
    (tmp_path / "compare.json").write_text(json.dumps(compared))
    calls: list[Path] = []
    monkeypatch.setattr(ask, "METRICS", tmp_path)
    monkeypatch.setattr(ask, "sha256", lambda path: calls.append(path) or sha256(path))  # pyright: ignore
    notes = ask.measured(ask.figures_of(tmp_path / "model.gguf"), abstract=False, share=0.9)
    assert ["55.0%" in note and "75.0%" in note for note in notes] == [True] * (same and size == 5)
    assert len(calls) == hashed


@pytest.mark.parametrize(
    ("question", "is_open"),
    [
        ("What dose of belacine should I give to my patient?", True),
        ("Acute pain: which drug?", True),
        ("List the side effects of belacine.", True),
        ("Does belacine reduce knee pain?", False),
        ("Xanthogranulomatous cholecystitis: a premalignant condition?", False),
        ("What you see on a chest radiograph: is it what you get?", False),
        ("Isn\u2019t belacine effective where placebo is not?", False),
        ("When given early, does belacine help?", False),
    ],
)
def test_a_question_that_does_not_ask_for_yes_no_or_maybe_is_known_by_its_first_words(question: str, is_open: bool):
    assert ask.is_open(question) is is_open


def test_the_server_refuses_a_file_that_llama_cpp_cannot_load(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf")  # an embedding and nothing else
    with pytest.raises(Fail, match="cannot be loaded"):
        serve.main(tmp_path / "model.gguf")
