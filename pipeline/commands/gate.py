"""Gate: is the tuned model worse than the main branch's beyond noise, or worse than its own base?

It reads what git holds and nothing else: tables of predictions and metrics, here and at a revision. It is a guard, not
a selector: every pull request meets the same test questions, so whoever chooses among changes by its figures fits the
test set; choices are made on validation questions.
"""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import typer

from pipeline.core.records import read_json
from pipeline.core.stage import Fail, run
from pipeline.reporting.compare import Params, check_same_questions, difference, headline
from pipeline.scoring.measures import Prediction, Predictions, parse_predictions, read_predictions

TUNED, BASE = Path("metrics/predictions/tuned.csv"), Path("metrics/predictions/base.csv")
EVALUATION = Path("metrics/evaluate.json")


class Incomparable(Exception):  # noqa: N818  # no mistake of anyone: the reason is told
    """Why the main branch's answers cannot be set against those here."""


class Judgement(NamedTuple):
    """`passed`, and why in a sentence; the tuned model minus the main branch's and minus its base (`difference`)."""

    passed: bool
    sentence: str
    main: dict[str, float] | None
    base: dict[str, float]


def commit_of(revision: str) -> str:
    """The full name of a revision's commit; raises `Fail` if git does not know it."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Fail("git is not installed, and the main branch's results are in git; install it") from None
    if "not a git repository" in done.stderr:
        raise Fail("this is no git repository, so there is no main branch to compare with; run this in a clone")
    if done.returncode != 0:  # a shallow clone, mostly
        raise Fail(
            f"git does not know {revision} here; run `git fetch origin main:refs/remotes/origin/main`, or name "
            "the main branch: `make gate MAIN=main`"
        )
    return done.stdout.strip()


def at(commit: str, path: Path) -> str:
    """The text of a file of this directory at a commit, empty if it was not there."""
    done = subprocess.run(["git", "show", f"{commit}:./{path}"], capture_output=True, check=False)
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def figures_at(commit: str, path: Path) -> dict[str, Any]:
    """The figures in a JSON file at a commit, none if it was not there or is no such file."""
    try:
        value: Any = json.loads(at(commit, path))
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def chat_version(figures: dict[str, Any]) -> Any:
    """The version of the protocol `chat` in the figures of `evaluate`, None in an older format."""
    section = figures.get("chat")
    return section.get("version") if isinstance(section, dict) else None


def answers(path: Path) -> Predictions:
    """The answers in a table of this directory; raises `Fail` if the protocol `chat` was not asked."""
    tables = read_predictions(path)
    if "chat" not in tables:
        raise Fail(f"{path} has no answers under the protocol chat; run `dvc repro`")
    return tables


def answers_at(commit: str, tuned: list[Prediction], version: Any) -> list[Prediction]:
    """The tuned model's answers at a commit, to the questions of `tuned`; raises `Incomparable`."""
    if not (text := at(commit, TUNED)):
        raise Incomparable(f"it has no {TUNED}")
    if (other := chat_version(figures_at(commit, EVALUATION))) != version:
        raise Incomparable(f"its protocol chat is of {f'version {other}' if other else 'an older format'}")
    try:
        rows = parse_predictions(text, f"its {TUNED}").get("chat", [])
        check_same_questions(["it", "this branch"], rows, tuned)
    except Fail as error:
        raise Incomparable(str(error).partition(";")[0]) from None
    return rows


def points(found: dict[str, float]) -> str:
    """A difference in accuracy with its interval, in words."""
    value, low, high = (100 * found[f"accuracy{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.1f} points of accuracy ({low:+.1f} to {high:+.1f})"


def judge(revision: str) -> Judgement:
    """This directory's tuned model against a revision's and against its own base, on the same questions.

    Worse than the revision's: the whole paired interval of the difference in accuracy is below 0, as noise is no reason
    to refuse a change. Worse than the base, which is credited with its better protocol: the difference itself is below
    0, as a tuned model has to earn its place.
    """
    params = Params.load("report")
    commit = commit_of(revision)
    base, tuned = headline(answers(BASE)), answers(TUNED)["chat"]
    check_same_questions([str(BASE), str(TUNED)], base, tuned)
    against_base = difference(base, tuned, params)
    against_main, worse = None, list[str]()
    try:
        version = chat_version(read_json(EVALUATION))
        against_main = difference(answers_at(commit, tuned, version), tuned, params)
        compared = f"{points(against_main)} against {revision}"
        if against_main["accuracy_high"] < 0:
            worse.append(f"that of {revision}")
    except Incomparable as reason:
        compared = f"not compared with {revision}, as {reason}"
    if against_base["accuracy"] < 0:
        worse.append("its own base")
    told = f"the tuned model is worse than {' and '.join(worse)}" if worse else "passed"
    sentence = (
        f"{told}: {compared}; {points(against_base)} against its base; "
        f"{len(tuned)} questions, {params.confidence:.0%} intervals"
    )
    return Judgement(not worse, sentence, against_main, against_base)


def main(revision: str) -> None:
    """Fail if the tuned model here is worse than that of REVISION (origin/main, say), or than its own base."""
    judgement = judge(revision)
    if not judgement.passed:
        raise Fail(judgement.sentence)
    typer.echo(f"gate: {judgement.sentence}")


if __name__ == "__main__":
    run(main)
