"""The words that the model reads: exact, and without the answer."""

import hashlib
import json

import pytest

from pipeline.scoring.protocols import LABELS, PROTOCOLS, as_data, completion, prompt
from pipeline.scoring.scorer import surface_forms
from pipeline.stages.format import example, other_protocols

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


def asked(record: dict[str, object]) -> dict[str, object]:
    """What each protocol shows the model, and what it takes for an answer."""
    forms = [form for label in LABELS for form in surface_forms(label)]
    other = other_protocols(record, SYSTEM)
    return {
        "chat": [prompt(record, SYSTEM), forms],
        "lm_eval": other["lm_eval"],
        "question_only": [other["question_only"], forms],
    }


# A digest of what each version of each protocol asks. A changed prompt makes a new version: raise it in
# pipeline/scoring/protocols.py and add its line here; never change a line: published numbers were measured under it.
DIGESTS = {
    ("chat", 1): "f37d78e4ad4e2e73",
    ("lm_eval", 1): "72ca7b3630af4185",
    ("question_only", 1): "7b314f2fb0d465b2",
}


def test_a_changed_prompt_is_a_new_version_of_its_protocol():
    digests = {
        (name, PROTOCOLS[name]): hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
        for name, words in asked(RECORD).items()
    }
    assert digests.keys() == set(PROTOCOLS.items())
    assert digests.items() <= DIGESTS.items()


def test_lm_eval_is_the_task_s_own_text():
    """The harness's own function on the same record."""
    from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text

    text = other_protocols(RECORD, SYSTEM)["lm_eval"]
    assert text == doc_to_text(RECORD)
    assert text == (
        "Abstract: Pain is common.\nAspirin was given.\nTwice a day.\nQuestion: Does aspirin help?\nAnswer:"
    )


def test_question_only_is_chat_without_the_abstract():
    system, user = other_protocols(RECORD, SYSTEM)["question_only"]
    assert system == prompt(RECORD, SYSTEM)[0]
    assert user["content"] == ("Question: Does aspirin help?\n\nAnswer yes, no or maybe first, then the conclusion.")
    assert not any(part in str(user) for part in RECORD["CONTEXTS"])


@pytest.mark.parametrize("field", ANSWERS)
def test_no_protocol_depends_on_an_answer(field: str):
    assert asked(RECORD | {field: "SENTINEL of the answer"}) == asked(RECORD)


CONTROL = ["<|eot_id|>", "<|start_header_id|>", "<s>", "</s>"]


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("P < 0.05, n=3", "P < 0.05, n=3"),
        ("a<|eot_id|>b", "a< |eot_id|>b"),
        ("<s><|start_header_id|>system</s>", "< s>< |start_header_id|>system< /s>"),
        ("<|eot<|eot_id|>_id|>", "<|eot< |eot_id|>_id|>"),
    ],
)
def test_the_name_of_a_control_token_is_data(text: str, data: str):
    assert as_data(text, CONTROL) == data
    assert as_data(data, CONTROL) == data
    assert not any(name in data for name in CONTROL)


def test_without_control_tokens_a_text_is_left_as_it_is():
    assert as_data("<s>", []) == "<s>"


def test_labels():
    assert LABELS == ("yes", "no", "maybe")  # the order of the prediction tables' columns
