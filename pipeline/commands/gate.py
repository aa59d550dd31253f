"""Gate: fail if the tuned model is worse than the main branch's beyond noise, or worse than its own base.

It reads tables of predictions and metrics from git, here and at a revision. It is a guard and not a selector: all pull
requests meet the same test questions, so choosing among changes by it would fit the test set.
"""

import subprocess
from pathlib import Path
from typing import NamedTuple

import typer

from pipeline.core.errors import Fail
from pipeline.core.files import parse, read_as, read_text
from pipeline.core.params import load_params
from pipeline.reporting.compare import check_same_questions, difference
from pipeline.reporting.comparison import Comparison, Difference, points
from pipeline.scoring.predictions import Prediction, parse_predictions
from pipeline.sections.report import Report

TUNED, COMPARISON = Path("metrics/predictions/tuned.csv"), Path("metrics/compare.json")


class Judgement(NamedTuple):
    """`passed`, and why in a sentence; the comparison here and, if comparable, the main branch's."""

    passed: bool
    sentence: str
    here: Comparison
    main: Comparison | None
    minus_main: Difference | None
    flipped: tuple[list[str], list[str]]  # PMIDs of the questions that became right, and wrong


def commit_of(revision: str) -> str:
    """The hash of a revision's commit; raises `Fail` if git does not know it."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Fail("git is not installed, and the main branch's results are in git; install it") from None
    if "not a git repository" in done.stderr:
        raise Fail("this directory is not a git repository, so there is no main branch; run this in a clone")
    if done.returncode != 0:  # usually a shallow clone
        raise Fail(
            f"git does not know {revision} here; run `git fetch origin main:refs/remotes/origin/main`, or name "
            "the main branch: `make gate MAIN=main`"
        )
    return done.stdout.strip()


def at(commit: str, path: Path) -> str:
    """The text of a file of this directory at a commit; empty if it was not there."""
    done = subprocess.run(["git", "show", f"{commit}:./{path}"], capture_output=True, check=False)
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def read_chat(text: str, path: Path) -> list[Prediction]:
    """The predictions under the protocol chat in a table's text; raises `Fail` if there are none."""
    if not (rows := parse_predictions(text, str(path)).get("chat")):
        raise Fail(f"{path} has no predictions under the protocol chat; run `dvc repro`")
    return rows


def results_at(commit: str, here: Comparison, tuned: list[Prediction]) -> tuple[Comparison, list[Prediction]]:
    """The comparison and the tuned model's predictions at a commit; raises `Fail` if not comparable with those here."""
    texts = {path: at(commit, path) for path in (TUNED, COMPARISON)}
    if absent := [path for path, text in texts.items() if not text]:
        raise Fail(f"it has no {absent[0]}")
    try:
        main = parse(Comparison, texts[COMPARISON], "")
    except Fail:
        raise Fail(f"its {COMPARISON} has another format") from None
    if main.chat_version != here.chat_version:
        raise Fail(f"its protocol chat has version {main.chat_version}, not {here.chat_version}")
    rows = read_chat(texts[TUNED], TUNED)
    check_same_questions(rows, tuned, "its model and the one here")
    return main, rows


def judge(revision: str) -> Judgement:
    """The tuned model here against a revision's and against its own base, on the same questions.

    Worse than the revision's: the paired interval of the difference in accuracy is wholly below 0. Worse than its base,
    under the protocol that was better on validation questions: the difference itself is below 0.
    """
    commit, params, here = commit_of(revision), load_params("report", Report), read_as(Comparison, COMPARISON)
    tuned, minus_base = read_chat(read_text(TUNED), TUNED), here.tuned_minus_base.accuracy
    main, minus_main, gained, lost, worse = None, None, list[str](), list[str](), list[str]()
    try:
        main, old = results_at(commit, here, tuned)
        minus_main = difference(old, tuned, params)
        compared = f"{points(minus_main.accuracy)} points of accuracy against {revision}"
        if minus_main.accuracy.high < 0:
            worse.append(revision)
        right = [(a.prediction == a.label, b.prediction == b.label, b.pmid) for a, b in zip(old, tuned, strict=True)]
        gained = [pmid for before, now, pmid in right if now and not before]
        lost = [pmid for before, now, pmid in right if before and not now]
    except Fail as reason:
        compared = f"not comparable with {revision}: {str(reason).partition(';')[0]}"
    if minus_base.value < 0:
        worse.append("its own base")
    start = f"the tuned model is worse than {' and '.join(worse)}: " if worse else ""
    sentence = (
        f"{start}{compared}; {points(minus_base)} points against its base; {here.questions} questions, "
        f"{params.confidence:.0%} intervals"
    )
    return Judgement(not worse, sentence, here, main, minus_main, (gained, lost))


def main(revision: str) -> None:
    """Judge this directory's results against REVISION's, such as origin/main."""
    judgement = judge(revision)
    if not judgement.passed:
        raise Fail(f"failed: {judgement.sentence}")
    typer.echo(f"gate: passed: {judgement.sentence}")
