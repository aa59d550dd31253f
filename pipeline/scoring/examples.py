"""Records -> training examples in a base's chat template, and the word n-grams in which two records overlap."""

import re

from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.record import Record
from pipeline.models.chat import ChatTemplate, as_data
from pipeline.models.encoder import Encoder
from pipeline.scoring.protocols import abstract_of, answer, evidence, messages


def without_control_tokens(record: Record, control: list[str]) -> Record:
    """The record with texts in which no tokenizer finds one of the `control` tokens."""
    return record.model_copy(
        update={
            "question": as_data(record.question, control),
            "long_answer": as_data(record.long_answer, control),
            "contexts": [as_data(text, control) for text in record.contexts],
            "labels": [as_data(text, control) for text in record.labels],
        }
    )


def ngrams(texts: list[str], n: int) -> set[tuple[str, ...]]:
    """The word n-grams of the joined texts, lower-cased, without punctuation."""
    words = re.findall(r"\w+", " ".join(texts).lower())
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def as_example(pmid: str, record: Record, system_prompt: str, template: ChatTemplate, encoder: Encoder) -> Example:
    """The record in the base's chat template, as token ids."""
    abstract = abstract_of(record)
    chat = template.render(messages(system_prompt, record.question, abstract), answer(record))
    try:
        input_ids, prompt_tokens = encoder.example(chat)
    except Fail as error:
        raise Fail(f"PMID {pmid}: {error}") from None
    return Example(
        pmid=pmid,
        label=record.final_decision,
        text=evidence(record.question, abstract),
        input_ids=input_ids,
        prompt_tokens=prompt_tokens,
    )
