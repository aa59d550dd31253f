"""The protocols: every way in which a model is asked a PubMedQA question, in one table.

The only place that turns a record into words for a model. The base and the tuned model see the same words.
"""

from collections.abc import Callable
from typing import NamedTuple

from pipeline.core.labels import Label
from pipeline.core.question import Message, Question
from pipeline.core.record import Record
from pipeline.sections.evaluate import ProtocolName

INSTRUCTION = "Answer yes, no or maybe first, then the conclusion."


class Protocol(NamedTuple):
    """How a question is asked under a protocol, and which answers are scored."""

    version: int  # raise it when the words or the forms change: numbers of two versions must not be compared
    prompt: Callable[[Question], list[Message] | str]  # chat messages, or plain text
    forms: Callable[[Label], list[str]]  # texts of a label right after the prompt; their probabilities are summed
    greedy: bool  # whether a written answer is asked for as a second opinion


def either_case(label: Label) -> list[str]:
    """The forms of a label as the first word of an assistant's answer."""
    return [label, label.capitalize()]


def after_space(label: Label) -> list[str]:
    """The form of a label as the continuation of plain text."""
    return [f" {label}"]


def chat(row: Question) -> list[Message]:
    """System prompt, abstract and question."""
    return messages(row.system_prompt, row.question, abstract_of(row))


def question_only(row: Question) -> list[Message]:
    """System prompt and question."""
    return messages(row.system_prompt, row.question, None)


def lm_eval(row: Question | Record) -> str:
    """The task's `doc_to_text` (lm_eval/tasks/pubmedqa/preprocess_pubmedqa.py)."""
    contexts = "\n".join(row.contexts)
    return f"Abstract: {contexts}\nQuestion: {row.question}\nAnswer:"


# chat           in the model's chat template: what training teaches and users see
# lm_eval        lm-evaluation-harness 0.4's task `pubmedqa`, plain text: comparable with published scores
# question_only  chat without the abstract: what the model knows without reading
PROTOCOLS: dict[ProtocolName, Protocol] = {
    "chat": Protocol(1, chat, either_case, True),
    "lm_eval": Protocol(1, lm_eval, after_space, False),
    "question_only": Protocol(1, question_only, either_case, False),
}


def user(question: str, abstract: str | None) -> str:
    """The user's turn: abstract if there is one, question, instruction."""
    return f"{evidence(question, abstract)}\n\n{INSTRUCTION}"


def evidence(question: str, abstract: str | None) -> str:
    """Abstract and question without the instruction: what the text baselines read."""
    given = f"Abstract:\n{abstract}\n\n" if abstract else ""
    return f"{given}Question: {question}"


def messages(system_prompt: str, question: str, abstract: str | None) -> list[Message]:
    """The system's and the user's turn."""
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": user(question, abstract)}]


def abstract_of(record: Record | Question) -> str:
    """The abstract with its section names. LONG_ANSWER, the conclusion, is not part of it."""
    sections = zip(record.labels, record.contexts, strict=True)
    return "\n".join(f"{name}: {text}" if name else text for name, text in sections)


def answer(record: Record) -> str:
    """The assistant's turn: the decision first, so that one forward pass scores it, then the conclusion."""
    return f"{record.final_decision.capitalize()}. {record.long_answer}"


def as_question(pmid: str, record: Record, system_prompt: str) -> Question:
    """The record as a test question."""
    return Question(
        pmid=pmid,
        label=record.final_decision,
        system_prompt=system_prompt,
        question=record.question,
        contexts=record.contexts,
        labels=record.labels,
    )
