"""Ask: a question and its abstract -> the decision with its probabilities, and the conclusion, from the GGUF alone.

The prompt, the chat template and the scorer are those of `evaluate`, the system prompt is the one in the GGUF: a test
question gets here the very probabilities that the metrics were computed from. Nothing is stored, and nothing is sent.
"""

import codecs
import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.records import is_text, read_object
from pipeline.core.stage import Fail, run
from pipeline.models.gguf_header import SYSTEM_PROMPT, read_metadata
from pipeline.scoring.protocols import as_data, chat
from pipeline.scoring.scorer import Scorer, log_sum_exp

GGUF = Path("models/medical-reasoner.gguf")
METRICS = Path("metrics")
N_CTX = 4096  # tokens, if the model knows so many; of an 8-billion-parameter Llama 3 they take half a gigabyte
MAX_NEW_TOKENS = 256  # of the answer: the longest in PubMedQA has 161 of Llama 3's
SURE = 2 / 3  # the decision's share of the labels' probability: below it, its odds are worse than two to one
ON_TOPIC = 1 / 2  # the labels' probability together: below it, the model would rather begin with something else


def read_context(path: Path) -> str:
    """The abstract in a text file, or on standard input for `-`; raises `Fail` if there is none."""
    name = "standard input" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError:
        raise Fail(f"{name} is no UTF-8 text; give the abstract as plain text") from None
    except OSError as error:
        raise Fail(f"{name} cannot be read ({error.strerror}); give the abstract as a text file") from None
    if "\0" in text:
        raise Fail(f"{name} is no text; give the abstract as plain text")
    if not text:
        raise Fail(f"{name} is empty; put the abstract there, or leave --context out")
    return text


def control_tokens(scorer: Scorer) -> list[str]:
    """The names of the GGUF's control tokens, such as `<|eot_id|>`."""
    control = (token for token in range(scorer.n_vocab) if scorer.lib.llama_vocab_is_control(scorer.vocab, token))
    return [scorer.piece(token).decode() for token in control]


def pose(scorer: Scorer, system_prompt: str, question: str, abstract: str | None) -> list[int]:
    """Token ids of the prompt, in which question and abstract are only data; raises `Fail` if they are too long."""
    control = control_tokens(scorer)
    question, abstract = as_data(question, control), abstract and as_data(abstract, control)
    tokens, _ = scorer.chat(chat(system_prompt, question, abstract))
    room = scorer.n_ctx - MAX_NEW_TOKENS
    if len(tokens) > room:
        raise Fail(
            f"question and abstract take {len(tokens)} tokens of {room}; give the abstract alone, or a part of it"
        )
    return tokens


def shares(scores: dict[str, float]) -> dict[str, float]:
    """The labels' log-probabilities -> each label's share of their probability, the likeliest first."""
    total = log_sum_exp(list(scores.values()))
    ordered = sorted(scores, key=lambda label: scores[label], reverse=True)
    return {label: math.exp(scores[label] - total) for label in ordered}


def doubts(scores: dict[str, float]) -> list[str]:
    """Why an answer is not to be relied on: the labels' probability together, or the decision's share, is too low."""
    decision, share = next(iter(shares(scores).items()))
    together = math.exp(log_sum_exp(list(scores.values())))
    found: list[str] = []
    if together < ON_TOPIC:
        found.append(f"Unsure: yes, no and maybe together have {together:.0%} of what it might have begun with.")
    if share < SURE:
        found.append(f"Unsure: the odds for '{decision}' are below two to one.")
    return found


def conclusion(scorer: Scorer, decision: str, position: int) -> Iterator[str]:
    """The greedy continuation of an answer that begins with `decision`, piece by piece, after `Scorer.score`.

    `position` is the prompt's length. A terminal's control characters are left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a letter can be several tokens
    tokens = scorer.tokenize(f"{decision.capitalize()}.")
    end = position + MAX_NEW_TOKENS
    while position + len(tokens) <= end:
        text = decoder.decode(b"".join(map(scorer.piece, tokens)))
        yield "".join(letter for letter in text if letter.isprintable() or letter == "\n")
        scorer.decode(tokens, [], position)
        position += len(tokens)
        token = int(scorer.log_probabilities(len(tokens) - 1).argmax())
        if scorer.lib.llama_vocab_is_control(scorer.vocab, token):  # the end of the turn is one
            break
        tokens = [token]


def measured(metrics: Path, abstract: bool, share: float) -> list[str]:
    """What the project's metrics, as far as they are there, say of an answer as sure as `share`."""
    if not (metrics / "compare.json").is_file():
        return []
    figures = read_object(metrics / "compare.json", "simulated", "questions", "tuned_accuracy")
    questions = "simulated test questions" if figures["simulated"] else "test questions"
    if not abstract:
        if "tuned_question_only_accuracy" not in figures:
            return []
        return [
            f"Without an abstract it is right on {figures['tuned_question_only_accuracy']:.1%} of "
            f"{figures['questions']} {questions}, with it on {figures['tuned_accuracy']:.1%}."
        ]
    if not (metrics / "reliability.csv").is_file():
        return []
    with (metrics / "reliability.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "tuned"]
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
) -> None:
    """Print the decision with its probabilities, then the conclusion as it is written."""
    if not is_text(question):
        raise Fail("the question is no UTF-8 text; give it as plain text")
    if not (question := question.strip()):
        raise Fail('the question is empty; put it in quotation marks: python -m pipeline.commands.ask "Does ...?"')
    abstract = read_context(context) if context else None
    about = read_metadata(gguf)
    if SYSTEM_PROMPT not in about:
        raise Fail(f"{gguf} does not say which system prompt it was trained with; make it with `dvc repro`")
    with Scorer(gguf, min(N_CTX, about[f"{about['general.architecture']}.context_length"])) as scorer:
        tokens = pose(scorer, about[SYSTEM_PROMPT], question, abstract)
        scores, _ = scorer.score(tokens, scorer.forms)
        found = shares(scores)
        decision = next(iter(found))
        typer.echo("   ".join(f"{label} {share:.1%}" for label, share in found.items()))
        notes = doubts(scores)
        if not abstract:
            notes.append("No abstract was given, so this is an answer from memory: give it with --context FILE.")
        if gguf == GGUF:  # of another file, they say nothing
            notes += measured(METRICS, bool(abstract), found[decision])
        for note in [*notes, "Only the decision was measured, never the conclusion. Not for clinical use."]:
            typer.echo(note)
        typer.echo()
        for text in conclusion(scorer, decision, len(tokens)):
            typer.echo(text, nl=False)
        typer.echo()


if __name__ == "__main__":
    run(main)
