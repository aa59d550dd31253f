"""The gate and the comment of a pull request, in repositories with two branches and no data."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from pipeline.commands import comment, gate
from pipeline.commands.gate import COMPARISON, judge
from pipeline.core.errors import Fail
from pipeline.core.outputs import write_json
from pipeline.scoring.predictions import write_predictions
from tests.branches import TUNED, commit, git, repository, table, write
from tests.conftest import ROOT, dvc_here, set_params

BASE_TABLE = table(range(100))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tmp_path_factory.mktemp("branches") / "project")


@pytest.fixture
def project(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = Path(shutil.copytree(original, tmp_path / "project"))
    monkeypatch.chdir(directory)
    monkeypatch.setattr(comment, "dvc", dvc_here)  # tests/flows/test_review.py starts it as the command does
    return directory


# Beyond the paired interval, or below the base


@pytest.mark.parametrize(
    ("wrong", "passed"),
    [
        (range(40), True),  # the same answers
        (range(20), True),
        (range(4, 47), True),  # 7 lost, 4 gained: noise
        (range(43), True),  # 3 lost, none gained: a sample has none of them with a chance of e^-3, more than 2.5 %
        (range(44), False),  # 4 lost: e^-4 is less
        (range(60), False),
    ],
)
def test_worse_than_main_is_an_interval_wholly_below_zero(project: Path, wrong: range, passed: bool) -> None:
    write(project, table(wrong), BASE_TABLE)
    judgement = judge("main")
    assert judgement.minus_main
    assert judgement.minus_main.accuracy.value == pytest.approx((40 - len(wrong)) / 200)
    assert judgement.passed == passed == (judgement.minus_main.accuracy.high >= 0)
    assert judgement.flipped == (
        [str(1000 + number) for number in range(40) if number not in wrong],
        [str(1000 + number) for number in wrong if number >= 40],
    )


def test_worse_than_the_base_is_any_loss_of_accuracy(project: Path) -> None:
    write(project, table(range(40)), table(range(39)))
    assert not judge("main").passed
    assert "its own base" in judge("main").sentence
    write(project, table(range(40)), table(range(40)))
    assert judge("main").passed


def test_a_model_that_is_worse_than_both_is_refused_for_both(project: Path) -> None:
    write(project, table(range(150)), BASE_TABLE)
    assert "main and its own base: " in judge("main").sentence


def test_the_interval_is_that_of_the_report(project: Path) -> None:
    write(project, table(range(4, 47)), BASE_TABLE)
    set_params(project, "report", confidence=0.51)  # the interval narrows until the loss is beyond it
    assert not judge("main").passed


# What is not comparable is judged against the base alone


def no_table(project: Path) -> None:
    (project / TUNED).unlink()


def no_comparison(project: Path) -> None:
    (project / COMPARISON).unlink()


def older_table(project: Path) -> None:
    (project / TUNED).write_text("pmid,label\n1000,yes\n")


def other_questions(project: Path) -> None:
    write_predictions(project / TUNED, table(range(40), first=2000))


def other_labels(project: Path) -> None:
    write_predictions(project / TUNED, [row._replace(label="yes") for row in table(range(40))])


def other_version(project: Path) -> None:
    values = json.loads((project / COMPARISON).read_text())
    write_json(project / COMPARISON, {**values, "chat_version": 2})


def flat_metrics(project: Path) -> None:
    write_json(project / COMPARISON, {"questions": 200, "tuned_accuracy": 0.8, "tuned_accuracy_low": 0.7})


def conflict_in_metrics(project: Path) -> None:
    (project / COMPARISON).write_text("<<<<<<< HEAD\n")


def change_main(project: Path, edit: Callable[[Path], None]) -> None:
    git(project, "switch", "--quiet", "main")
    edit(project)
    commit(project, "another main")
    git(project, "switch", "--quiet", "change")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (no_table, "no metrics/predictions/tuned.csv"),
        (no_comparison, "no metrics/compare.json"),
        (older_table, "tuned.csv does not have the columns"),
        (other_questions, "PMID 1000"),
        (other_labels, "PMID 1001"),
        (other_version, "version 2"),
        (flat_metrics, "another format"),
        (conflict_in_metrics, "another format"),
    ],
)
def test_what_is_not_comparable_is_judged_against_the_base_alone(
    project: Path, edit: Callable[[Path], None], reason: str
) -> None:
    change_main(project, edit)
    write(project, table(range(90)), BASE_TABLE)  # far worse than main, better than the base
    judgement = judge("main")
    assert judgement.passed
    assert (judgement.main, judgement.minus_main, judgement.flipped) == (None, None, ([], []))
    assert "not comparable with main: " in judgement.sentence
    assert reason in judgement.sentence
    assert "\n" not in judgement.sentence
    write(project, table(range(150)), BASE_TABLE)
    assert not judge("main").passed


@pytest.mark.parametrize("path", [TUNED, COMPARISON])
def test_what_is_missing_here_is_a_failure_not_a_pass(project: Path, path: Path) -> None:
    path.unlink()
    with pytest.raises(Fail, match=r"is missing; run `dvc repro`"):
        judge("main")


# Git


def test_without_a_repository_or_git_it_says_so(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(project / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(Fail, match="not a git repository"):
        judge("main")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Fail, match="git is not installed"):
        judge("main")


def test_a_shallow_clone_lacks_the_main_branch_and_the_command_that_it_names_brings_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, table(range(60)), BASE_TABLE)
    commit(project, "worse")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", "--branch=change", f"file://{project}", str(clone))
    monkeypatch.chdir(clone)
    with pytest.raises(Fail, match="git does not know origin/main here") as error:
        judge("origin/main")
    fetch = re.findall(r"`(git fetch [^`]*)`", str(error.value))[0]
    subprocess.run([*fetch.split(), "--quiet", "--depth=1"], check=True, capture_output=True)
    assert "worse than origin/main" in judge("origin/main").sentence


# The comment


@pytest.fixture
def no_tables(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC's own two tables, which take most of the time, are empty."""
    monkeypatch.setattr(comment, "dvc", lambda *_: "")


def commented(capsys: pytest.CaptureFixture[str]) -> str:
    comment.main("main", "https://example.org/pictures")
    return capsys.readouterr().out


def test_the_comment_starts_with_the_gate_and_holds_what_a_reviewer_needs(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(project, "train", lora_alpha=32)
    resources = {"peak_rss_mib": 901.5, "peak_vram_reserved_mib": 5410.0, "seconds": 61.0}
    write(project, table(range(4, 38)), BASE_TABLE, train={"validation_loss": 1.4375}, train_resources=resources)
    commit(project, "a change")
    text = commented(capsys)
    above, folded = text.split("<details>", 1)
    mark, title = above.splitlines()[:2]
    assert mark == "<!-- medical-reasoner: report -->"  # the workflow finds the comment to update by it
    assert "passed" in title
    assert "simulated" in above
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in above.splitlines()
        if line.startswith("| ")
    }
    assert cells["accuracy"][:2] == ["80.0%", "83.0%"]
    for name in ("accuracy", "macro-F1", "recall of yes", "recall of no", "recall of maybe"):
        assert re.fullmatch(r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)", cells[name][2])
    assert cells["training: peak VRAM, MiB"][:2] == ["5,400", "5,410"]
    assert cells["training: time, s"][:2] == ["60", "61"]
    assert cells["size of the GGUF, bytes"][:2] == ["1,000,000", "1,000,000"]
    assert "train.lora_alpha" in above
    assert len(above.splitlines()) < 40  # one screen
    assert "1000, 1001, 1002, 1003, 1038, 1039" in folded  # became right
    assert folded.count("https://example.org/pictures/") == 3
    assert "tuned.accuracy.value" in folded
    assert "| numeric results in the abstract | absent | 40 |" in folded
    assert text.count("<details>") == text.count("</details>")


def test_github_would_draw_the_comments_tables_and_folds(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_params(project, "train", lora_alpha=32)
    write(project, table(range(4, 38)), BASE_TABLE)
    page = MarkdownIt().enable("table").render(commented(capsys))
    assert page.count("<table>") == 4  # figures, parameters, slices, all metrics
    assert page.count("<details>") == page.count("</details>") == 4  # flips, slices, pictures, metrics
    assert page.count("<img ") == 3
    assert "&lt;" not in page
    assert not re.search(r"<p>[^<]*\|", page)  # the row of a table that was none


def test_many_parameters_are_folded(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text((ROOT / "profiles/llama3-8b.yaml").read_text())
    set_params(project, "report", confidence=0.95)
    write(project, table(range(4, 38)), BASE_TABLE)
    above = commented(capsys).split("<details>")[0]
    assert "train.lora" not in above
    assert len(above.splitlines()) < 40


@pytest.mark.usefixtures("no_tables")
def test_the_comment_on_a_refused_change_begins_with_the_sentence_of_the_gate(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, table(range(60)), BASE_TABLE)
    with pytest.raises(Fail) as error:
        gate.main("main")
    _, title, _, sentence, *_ = commented(capsys).splitlines()
    assert "failed" in title
    assert sentence[1:] == str(error.value).removeprefix("failed: ")[1:] + "."


@pytest.mark.usefixtures("no_tables")
def test_the_comment_is_made_without_the_main_branchs_figures_too(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_main(project, flat_metrics)
    text = commented(capsys)
    assert "not comparable with main" in text.lower()
    assert "| accuracy |  | 80.0% |  |" in text


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("text", [None, "<<<<<<< HEAD\n", "[]"])
def test_a_cost_that_was_not_measured_on_one_side_is_blank(
    project: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    path = project / "metrics/train_resources.json"
    path.unlink() if text is None else path.write_text(text)
    assert "| training: time, s | 60 |  |  |" in commented(capsys)
