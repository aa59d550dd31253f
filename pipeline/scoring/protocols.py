"""The only place that turns a PubMedQA record into words for the model, by protocol.

`train`, `evaluate`, `baseline` and `reference` read these words from data/formatted/*.jsonl, so that the base and the
tuned model meet the very same question; `ask` calls the same functions.
"""

import re
from collections.abc import Iterable

from pipeline.core.records import Message, Record

LABELS = ("yes", "no", "maybe")  # PubMedQA's answers, Jin et al. 2019, https://arxiv.org/abs/1909.06146

INSTRUCTION = "Answer yes, no or maybe first, then the conclusion."

# Each way of asking, with its version: numbers of two versions of a protocol must not be compared, so whoever changes
# a prompt or its choices raises the version (tests/unit/test_prompt.py holds a digest of each).
#   chat           ours: in the model's chat template, what training teaches and users meet; 'yes' or 'Yes'
#   lm_eval        lm-evaluation-harness 0.4's task `pubmedqa`: plain text and ' yes', to compare with published scores
#   question_only  chat without the abstract: what is known without reading
PROTOCOLS = {"chat": 1, "lm_eval": 1, "question_only": 1}


def user(question: str, abstract: str | None) -> str:
    """The user's turn: abstract if there is one, question, instruction."""
    given = f"Abstract:\n{abstract}\n\n" if abstract else ""
    return f"{given}Question: {question}\n\n{INSTRUCTION}"


def chat(system_prompt: str, question: str, abstract: str | None) -> list[Message]:
    """The system's and the user's turn."""
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": user(question, abstract)}]


def prompt(record: Record, system_prompt: str) -> list[Message]:
    """Protocol `chat` for a record.

    Reads CONTEXTS, LABELS (the abstract's section names) and QUESTION alone: LONG_ANSWER and the `reasoning_*`
    fields hold the answer.
    """
    sections = zip(record["LABELS"], record["CONTEXTS"], strict=True)
    abstract = "\n".join(f"{name}: {text}" if name else text for name, text in sections)
    return chat(system_prompt, record["QUESTION"], abstract)


def question_only(record: Record, system_prompt: str) -> list[Message]:
    """Protocol `question_only` for a record."""
    return chat(system_prompt, record["QUESTION"], None)


def lm_eval(record: Record) -> str:
    """Protocol `lm_eval` for a record: the task's `doc_to_text` (lm_eval/tasks/pubmedqa/preprocess_pubmedqa.py)."""
    contexts = "\n".join(record["CONTEXTS"])
    return f"Abstract: {contexts}\nQuestion: {record['QUESTION']}\nAnswer:"


def completion(record: Record) -> list[Message]:
    """The assistant's turn: the decision first, so that one forward pass scores it, then the conclusion."""
    decision = record["final_decision"].capitalize()
    return [{"role": "assistant", "content": f"{decision}. {record['LONG_ANSWER']}"}]


def as_data(text: str, control: Iterable[str]) -> str:
    """`text` with a space inside each name of a control token, which a tokenizer would take for the token itself.

    `<|eot_id|>` in an abstract would end the user's turn. With the space it is only letters.
    """
    names = sorted(control, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), lambda name: f"{name[0][0]} {name[0][1:]}", text) if names else text
