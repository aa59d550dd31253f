"""A question and its abstract -> the decision with its probabilities, and the conclusion, from the GGUF alone.

The prompt, the chat template and the scorer are those of `evaluate`, and the system prompt is the one in the GGUF, so a
test question gets the probabilities that the metrics were computed from. Nothing is stored, and nothing is sent.
"""

import codecs
import csv
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.core.errors import Fail
from pipeline.core.files import read_text, sha256
from pipeline.core.json_files import read_json_object
from pipeline.core.labels import Label
from pipeline.models.card import check_room
from pipeline.models.chat import as_data
from pipeline.models.gguf_header import SYSTEM_PROMPT, read_header
from pipeline.models.memory import Load
from pipeline.reporting.comparison import TUNED
from pipeline.scoring.protocols import PROTOCOLS, messages
from pipeline.scoring.scorer import MAX_TAILS, N_UBATCH, Choices, Scorer, number
from pipeline.sections.evaluate import CacheType

GGUF = Path("models/medical-reasoner.gguf")
METRICS = Path("metrics")
N_CTX = 2048  # tokens, if the model supports as many: an abstract of over a thousand words, on a card of 4 GB too
MAX_NEW_TOKENS = 256  # of the answer: the longest in PubMedQA has 161 of Llama 3's
SURE = 2 / 3  # of the labels' probability: below it, the odds for the decision are under two to one
MEASURED = "Only the decision was judged, on English questions; the conclusion was not. Not for clinical use."
ON_TOPIC = 1 / 2  # of all probability: below it, the model would rather begin with another word than the labels

# Words that begin a question, or a clause of one. On PubMedQA's 1,000 questions the check below has no false alarm.
OPEN = set("what which who whom whose when where why how list name give explain describe tell".split())
CLOSED = set(
    "am is are was were do does did has have had can could may might must shall should will would isn't aren't wasn't "
    "weren't don't doesn't didn't hasn't haven't hadn't can't couldn't mustn't shouldn't won't wouldn't".split()
)


def read_context(path: Path) -> str:
    """The abstract in a text file, or on standard input for `-`; raises `Fail` if there is none."""
    name = "standard input" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError:
        raise Fail(f"{name} is not UTF-8 text; give the abstract as plain text") from None
    except OSError as error:
        raise Fail(f"{name} cannot be read ({error.strerror}); give the abstract as a text file") from None
    if "\0" in text:
        raise Fail(f"{name} is not text; give the abstract as plain text")
    if not text:
        raise Fail(f"{name} is empty; put the abstract there, or leave out --context")
    return text


def encode(scorer: Scorer, system_prompt: str, question: str, abstract: str | None) -> tuple[list[int], Choices]:
    """Token ids of the prompt, in which question and abstract are only data, and of the labels; raises `Fail`."""
    control = scorer.control_tokens()
    question, abstract = as_data(question, control), abstract and as_data(abstract, control)
    tokens, choices = scorer.encode(messages(system_prompt, question, abstract), PROTOCOLS["chat"])
    room = scorer.n_ctx - MAX_NEW_TOKENS
    if len(tokens) > room:
        raise Fail(f"question and abstract have {len(tokens)} tokens, at most {room} fit; shorten the abstract")
    return tokens, choices


def shares(scores: dict[Label, float]) -> dict[Label, float]:
    """The labels' log-probabilities -> each label's share of their probability, the most probable first."""
    total = np.logaddexp.reduce(list(scores.values()))
    ordered = sorted(scores, key=lambda label: scores[label], reverse=True)
    return {label: float(np.exp(scores[label] - total)) for label in ordered}


def together(scores: dict[Label, float]) -> float:
    """The labels' log-probabilities -> the probability of the three together."""
    return float(np.exp(np.logaddexp.reduce(list(scores.values()))))


def is_open(question: str) -> bool:
    """Whether an English question asks for something else than yes, no or maybe, as 'What dose ...?' does."""
    first = {
        found.lower()
        for found in re.findall(r"(?:^|[:;,.?!\u2013\u2014-]\s)\W*([\w']+)", question.replace("\u2019", "'"))
    }
    return bool(first & OPEN) and not first & CLOSED


def doubts(scores: dict[Label, float]) -> list[str]:
    """Why an answer is unreliable: the labels' probability together, or the decision's share of it, is low."""
    decision, share = next(iter(shares(scores).items()))
    found: list[str] = []
    if (mass := together(scores)) < ON_TOPIC:
        found.append(f"Unsure: yes, no and maybe together have {mass:.0%} of the probability of the first word.")
    if share < SURE:
        found.append(f"Unsure: the odds for '{decision}' are below two to one.")
    return found


def conclusion(scorer: Scorer, decision: str, position: int) -> Iterator[str]:
    """The greedy continuation of an answer that begins with `decision`, piece by piece, after `Scorer.score`.

    `position` is the prompt's length in tokens. A terminal's control characters are left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # one letter can be several tokens
    decided = scorer.tokenize(f"{decision.capitalize()}.")
    scorer.decode(decided, [], position)
    first = scorer.logits(len(decided) - 1)
    tokens = scorer.continuation(first, position + len(decided), MAX_NEW_TOKENS - len(decided))
    written = takewhile(lambda token: not scorer.is_control(token), tokens)  # the end of the turn is one
    for piece in chain([b"".join(map(scorer.piece, decided))], map(scorer.piece, written)):
        yield "".join(letter for letter in decoder.decode(piece) if letter.isprintable() or letter == "\n")


def figures_of(gguf: Path) -> Any:
    """The metrics if they are of this file, else None; only a file of the right size is hashed."""
    comparison = METRICS / "compare.json"
    figures: Any = read_json_object(comparison) if comparison.is_file() else {}
    about = figures.get("gguf", {})
    same = about.get("bytes") == gguf.stat().st_size and about["sha256"] == sha256(gguf)
    return figures if same else None


def measured(figures: Any, abstract: bool, share: float) -> list[str]:
    """What the metrics say about an answer as sure as `share`; nothing without metrics."""
    curve = METRICS / "curves" / "reliability.csv"
    if not figures:
        return []
    questions = f"{'simulated ' * figures['simulated']}test questions"
    tuned = figures["tuned"]
    if not abstract:
        without = tuned["protocols"].get("question_only")
        if not without:
            return []
        return [
            f"Without an abstract it is right on {without['accuracy']['value']:.1%} of {figures['questions']} "
            f"{questions}, with it on {tuned['accuracy']['value']:.1%}."
        ]
    if not curve.is_file():
        return []
    rows = [row for row in csv.DictReader(read_text(curve).splitlines()) if row["model"] == TUNED]
    return [
        f"Of {row['questions']} {questions} answered about as surely, {float(row['accuracy']):.0%} were answered right."
        for row in rows
        if float(row["low"]) <= share < float(row["high"]) or share == float(row["high"]) == 1
    ]


def main(
    question: Annotated[str, typer.Argument(help="A question that yes, no or maybe answers.")],
    context: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The abstract, as a text file; - is standard input.")
    ] = None,
    gguf: Annotated[Path, typer.Option(metavar="FILE", help="The model.")] = GGUF,
    cache_type: Annotated[
        CacheType, typer.Option(help="Type of keys and values: f16, or q8_0 at half the memory.")
    ] = "f16",
) -> None:
    """Print the decision with its probabilities, then the conclusion as it is written."""
    question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
    if not question:
        raise Fail('the question is empty; put it in quotation marks: python -m pipeline ask "Does ...?"')
    abstract = read_context(context) if context else None
    header = read_header(gguf)
    about = header.metadata
    if SYSTEM_PROMPT not in about:
        raise Fail(f"{gguf} does not say which system prompt it was trained with; use a file that `dvc repro` made")
    figures = ThreadPoolExecutor(1).submit(figures_of, gguf)  # hashes a large file while llama.cpp loads it
    n_ctx = min(N_CTX, about[f"{about['general.architecture']}.context_length"])
    flash = cache_type == "q8_0"
    load = Load(n_ctx, N_UBATCH, cache_type, flash_attention=flash, n_outputs=1 + MAX_TAILS)  # as Scorer does
    remedy = check_room(gguf, header, load, number("N_GPU_LAYERS", 999))
    with Scorer(gguf, n_ctx, remedy, cache_type) as scorer:
        tokens, choices = encode(scorer, about[SYSTEM_PROMPT], question, abstract)
        scores, _ = scorer.score(tokens, choices)
        found = shares(scores)
        decision = next(iter(found))
        typer.echo("   ".join(f"{label} {share:.1%}" for label, share in found.items()))
        notes = doubts(scores)
        if is_open(question):
            notes.append(
                "This question does not ask for yes, no or maybe, and the model knows no other answer: rephrase it."
            )
        if not abstract:
            notes.append("No abstract was given, so this is an answer from memory: give it with --context FILE.")
        notes += measured(figures.result(), bool(abstract), found[decision])
        for note in [*notes, MEASURED]:
            typer.echo(note)
        typer.echo()
        try:
            for text in conclusion(scorer, decision, len(tokens)):
                typer.echo(text, nl=False)
        finally:  # also after Ctrl-C
            typer.echo()
