"""The words that a model reads: exact, without the answer, and unchanged within a version of a protocol."""

import hashlib
import json
from typing import Any

import pytest

from pipeline.core.labels import LABELS
from pipeline.core.record import Record
from pipeline.scoring.protocols import PROTOCOLS, abstract_of, answer, as_question, evidence

SYSTEM = "You are a medical expert."
ANSWERS = {
    "LONG_ANSWER": "SENTINEL-LONG Aspirin helps.",
    "final_decision": "yes",
    "reasoning_required_pred": "SENTINEL-REQUIRED",
    "reasoning_free_pred": "SENTINEL-FREE",
}
RECORD: dict[str, Any] = {
    "QUESTION": "Does aspirin help?",
    "CONTEXTS": ["Pain is common.", "Aspirin was given.\nTwice a day."],
    "LABELS": ["BACKGROUND", ""],
    "MESHES": ["SENTINEL-MESH"],
    "YEAR": "1999",
    **ANSWERS,
}
ABSTRACT = "BACKGROUND: Pain is common.\nAspirin was given.\nTwice a day."
INSTRUCTION = "Answer yes, no or maybe first, then the conclusion."


def asked(**changes: Any) -> dict[str, Any]:
    """Protocol -> the words that it shows a model, and the labels' forms."""
    question = as_question("17", Record.model_validate(RECORD | changes), SYSTEM)
    return {
        name: [protocol.prompt(question), [form for label in LABELS for form in protocol.forms(label)]]
        for name, protocol in PROTOCOLS.items()
    }


def test_chat_shows_abstract_question_and_instruction():
    assert asked()["chat"][0] == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Abstract:\n{ABSTRACT}\n\nQuestion: Does aspirin help?\n\n{INSTRUCTION}"},
    ]


def test_question_only_is_chat_without_the_abstract():
    chat, alone = asked()["chat"], asked()["question_only"]
    assert alone[0] == [chat[0][0], {"role": "user", "content": f"Question: Does aspirin help?\n\n{INSTRUCTION}"}]


def test_lm_eval_is_the_task_s_own_text():
    from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text

    assert asked()["lm_eval"][0] == doc_to_text(RECORD)


def test_both_cases_of_a_label_count_as_the_first_word_of_an_answer():
    both = ["yes", "Yes", "no", "No", "maybe", "Maybe"]
    assert [forms for _, forms in asked().values()] == [both, [" yes", " no", " maybe"], both]


@pytest.mark.parametrize("field", ANSWERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_protocol_shows_an_answer(protocol: str, field: str):
    changed = "no" if field == "final_decision" else "SENTINEL of the answer"
    assert asked(**{field: changed})[protocol] == asked()[protocol]
    assert "SENTINEL" not in str(asked()[protocol])


def test_the_text_for_the_baselines_is_the_users_turn_without_the_instruction():
    words = evidence(RECORD["QUESTION"], abstract_of(Record.model_validate(RECORD)))
    assert asked()["chat"][0][1]["content"] == f"{words}\n\n{INSTRUCTION}"


@pytest.mark.parametrize("decision", LABELS)
def test_an_answer_begins_with_the_decision(decision: str):
    record = Record.model_validate(RECORD | {"final_decision": decision})
    assert answer(record) == f"{decision.capitalize()}. SENTINEL-LONG Aspirin helps."


# A digest of what each version of each protocol asks. A changed prompt makes a new version: raise it in
# pipeline/scoring/protocols.py and add its line here; never change a line: published numbers were measured under it.
DIGESTS = {
    ("chat", 1): "f37d78e4ad4e2e73",
    ("lm_eval", 1): "72ca7b3630af4185",
    ("question_only", 1): "7b314f2fb0d465b2",
}


def test_a_changed_prompt_is_a_new_version_of_its_protocol():
    digests = {
        (name, PROTOCOLS[name].version): hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
        for name, words in (asked() | {"lm_eval": asked()["lm_eval"][0]}).items()
    }
    assert digests.items() <= DIGESTS.items()
