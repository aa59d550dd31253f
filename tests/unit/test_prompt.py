"""The words that the model reads: exact, and without the answer."""

import pytest

from pipeline.format import example
from pipeline.prompt import LABELS, completion, prompt

SYSTEM = "You are a medical expert."
ANSWERS = {
    "LONG_ANSWER": "SENTINEL-LONG Aspirin helps.",
    "final_decision": "yes",
    "reasoning_required_pred": "SENTINEL-REQUIRED",
    "reasoning_free_pred": "SENTINEL-FREE",
}
RECORD = {
    "QUESTION": "Does aspirin help?",
    "CONTEXTS": ["Pain is common.", "Aspirin was given.\nTwice a day."],
    "LABELS": ["BACKGROUND", ""],
    "MESHES": ["SENTINEL-MESH"],
    "YEAR": "1999",
    **ANSWERS,
}


def test_prompt():
    assert prompt(RECORD, SYSTEM) == [
        {"role": "system", "content": SYSTEM},
        {
            "role": "user",
            "content": "Abstract:\n"
            "BACKGROUND: Pain is common.\n"
            "Aspirin was given.\nTwice a day.\n"
            "\n"
            "Question: Does aspirin help?\n"
            "\n"
            "Answer yes, no or maybe first, then the conclusion.",
        },
    ]


@pytest.mark.parametrize(("decision", "word"), [("yes", "Yes"), ("no", "No"), ("maybe", "Maybe")])
def test_completion_starts_with_the_decision(decision: str, word: str):
    [message] = completion(RECORD | {"final_decision": decision})
    assert message == {"role": "assistant", "content": f"{word}. SENTINEL-LONG Aspirin helps."}


@pytest.mark.parametrize("field", ANSWERS)
def test_the_prompt_never_depends_on_an_answer(field: str):
    words = "SENTINEL of the answer"
    assert prompt(RECORD | {field: words}, SYSTEM) == prompt(RECORD, SYSTEM)
    assert "SENTINEL" not in str(prompt(RECORD | {field: words}, SYSTEM))
    without = {name: value for name, value in RECORD.items() if name != field}
    assert prompt(without, SYSTEM) == prompt(RECORD, SYSTEM)


def test_an_example_keeps_prompt_and_answer_apart():
    row = example("17", RECORD, SYSTEM)
    assert row == {"pmid": "17", "label": "yes", "prompt": prompt(RECORD, SYSTEM), "completion": completion(RECORD)}


def test_labels():
    assert LABELS == ("yes", "no", "maybe")  # the order of the prediction tables' columns
