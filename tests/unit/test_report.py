"""The report: its figures, its pictures, what is released, and the summary."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import summary
from pipeline.core.stage import Fail
from pipeline.stages import report
from tests.tables import OUTPUTS, make_report, write_inputs


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with every input of the stage."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return tmp_path


def make() -> dict[str, Any]:
    return make_report(Path())


def contents() -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for name in OUTPUTS for path in [Path(name), *Path(name).rglob("*")] if path.is_file()
    }


def test_figures_are_flat_and_numeric_and_files_are_the_same_twice(project: Path) -> None:
    figures = make()
    assert all(isinstance(value, int | float) for value in figures.values())
    assert (figures["simulated"], figures["tfidf_accuracy"]) == (True, 0.568)
    assert figures["gguf_bytes"] == Path("medical-reasoner.gguf").stat().st_size
    first = contents()
    make()
    assert contents() == first
    assert not any(str(project).encode() in content for content in first.values())


def test_questions_are_paired_by_pmid_whatever_their_order(project: Path) -> None:
    figures = make()
    header, *lines = Path("tuned.csv").read_text().splitlines()
    Path("tuned.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert make() == figures


def test_pictures_hold_their_words_and_say_simulated(project: Path) -> None:
    make()
    pictures = {path.stem: path.read_text() for path in Path("pictures").iterdir()}
    words = {
        "accuracy": "Accuracy on",
        "confusion": "What each model answers",
        "loss": "Training loss",
        "reliability": "Is it right as often as it is sure?",
        "right_label": "Probability of the right label",
        "risk_coverage": "What abstaining buys",
    }
    assert pictures.keys() == words.keys()
    for name, svg in pictures.items():
        assert words[name] in svg
        assert "simulated" in svg
    confusion = pictures["confusion"]
    assert confusion.index("untuned base") < confusion.index("tuned model")


def test_a_refusal_leaves_the_outputs_as_they_were(project: Path) -> None:
    make()
    before = contents()
    Path("tuned.csv").write_text(Path("tuned.csv").read_text().replace("chat,1000,yes", "chat,1000,no"))
    with pytest.raises(Fail, match="PMID 1000"):
        make()
    assert contents() == before


def test_the_stage_runs_without_torch_and_without_importing_a_drawing_library_early(project: Path) -> None:
    code = "import sys, pipeline.stages.report as r; assert not {'torch', 'vl_convert', 'sklearn'} & set(sys.modules)"
    root = Path(report.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)})


def test_the_summary_fits_a_terminal_and_tells_what_matters(project: Path) -> None:
    figures = make()
    text = summary.summary(figures, "The results equal the committed ones.")
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        f"{figures['tuned_accuracy']:.1%}",
        "majority",
        "TF-IDF",
        "not medical accuracy",
        "make plots",
        "GGUF",
    ):
        assert words.lower() in text.lower()
    assert "not medical accuracy" not in summary.summary({**figures, "simulated": False}, "")


def test_the_summary_compares_with_the_last_commit_but_for_times_and_memory(project: Path) -> None:
    assert "no git repository" in summary.committed()

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
        )

    git("init")
    metrics = Path("metrics")
    metrics.mkdir()
    for name in ("compare.json", "train_resources.json", "train_memory.csv"):
        (metrics / name).write_text("1")
    assert "differ" in summary.committed()  # nothing is committed yet
    git("add", ".")
    git("commit", "-m", "results")
    assert "equal" in summary.committed()
    (metrics / "train_resources.json").write_text("2")
    (metrics / "train_memory.csv").write_text("2")
    assert "equal" in summary.committed()
    (metrics / "compare.json").write_text("2")
    assert "differ" in summary.committed()


def test_the_summary_of_an_unfinished_run_is_one_sentence(project: Path) -> None:
    with pytest.raises(Fail, match="run `make repro`"):
        summary.main()
