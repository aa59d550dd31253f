"""The only place that turns a PubMedQA record into words for the model.

`train`, `evaluate` and `baseline` read these words from data/formatted/*.jsonl, so that the base and the tuned
model meet the very same question.
"""

from pipeline.records import Message, Record

LABELS = ("yes", "no", "maybe")  # PubMedQA's answers, Jin et al. 2019, https://arxiv.org/abs/1909.06146

INSTRUCTION = "Answer yes, no or maybe first, then the conclusion."


def prompt(record: Record, system_prompt: str) -> list[Message]:
    """The system's and the user's turn for a record: abstract, question, instruction.

    Reads CONTEXTS, LABELS (the abstract's section names) and QUESTION alone: LONG_ANSWER and the `reasoning_*`
    fields hold the answer.
    """
    sections = zip(record["LABELS"], record["CONTEXTS"], strict=True)
    abstract = "\n".join(f"{name}: {text}" if name else text for name, text in sections)
    return [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": f"Abstract:\n{abstract}\n\nQuestion: {record['QUESTION']}\n\n{INSTRUCTION}"},
    ]


def completion(record: Record) -> list[Message]:
    """The assistant's turn: the decision first, so that one forward pass scores it, then the conclusion."""
    decision = record["final_decision"].capitalize()
    return [{"role": "assistant", "content": f"{decision}. {record['LONG_ANSWER']}"}]
