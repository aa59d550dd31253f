"""The stage `report`: its files, and the summary of a run."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands import summary
from pipeline.core.errors import Fail
from pipeline.core.files import read_as, sha256
from pipeline.reporting.comparison import Comparison, advice, listed
from pipeline.scoring.predictions import read_predictions, write_predictions
from tests.branches import commit, git
from tests.tables import OUTPUTS, ROOT, TFIDF, make_report, write_inputs

TUNED = Path("metrics/predictions/tuned.csv")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with every input of the stage."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return tmp_path


def make() -> Comparison:
    make_report(Path())
    return read_as(Comparison, Path("metrics/compare.json"))


def contents(directory: Path) -> dict[Path, bytes]:
    paths = [path for name in OUTPUTS for path in [directory / name, *(directory / name).rglob("*")]]
    return {path.relative_to(directory): path.read_bytes() for path in paths if path.is_file()}


def test_two_runs_write_the_same_files_and_name_no_path_of_this_machine(project: Path, reported: Path) -> None:
    compared = make()
    assert (compared.simulated, compared.rehearsal, compared.data) == (True, False, "made-up trials")
    assert compared.tfidf.accuracy.value == TFIDF.accuracy.value
    assert compared.base_protocol.chosen == "lm_eval"
    assert compared.gguf.sha256 == sha256(Path("medical-reasoner.gguf"))
    found = contents(project)
    assert found == contents(reported)
    assert not any(str(project).encode() in content for content in found.values())


def test_curves_hold_what_the_comparison_says(reported: Path) -> None:
    compared = read_as(Comparison, reported / "metrics/compare.json")
    with (reported / "metrics/curves/accuracy.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["tuned model"]["low"]) == compared.tuned.accuracy.low
    assert len(rows) == 5
    with (reported / "metrics/curves/right_label.csv").open() as file:
        assert len(list(csv.DictReader(file))) == compared.questions


def test_the_choice_table_has_each_file_and_says_which_is_for_whom(reported: Path) -> None:
    compared = read_as(Comparison, reported / "metrics/compare.json")
    files = listed(compared)
    assert list(files) == ["Q4_K_M", "IQ3_XS"]
    other = files["IQ3_XS"]
    assert other.sha256 == sha256(reported / "quantized/medical-reasoner-IQ3_XS.gguf")
    lost = compared.tuned_minus_merged
    assert lost
    headline = files["Q4_K_M"]
    assert (headline.accuracy, headline.changed) == (compared.tuned.accuracy, lost.changed)
    assert headline.kl == lost.renormalised.kl_merged_to_tuned
    assert other.accuracy.value < compared.tuned.accuracy.value
    assert other.vram_mib
    cache = 32 * 2 * 8 * 128 * 8.5 / 8 / 2**20  # MiB of a token of Llama-3-8B at q8_0
    assert other.vram_mib.tokens_8192 - other.vram_mib.tokens_2048 > 6144 * cache
    text = summary.summary(compared, "", {"IQ3_XS": 12.0})
    for page in (text, *((reported / "release" / name).read_text() for name in ("README.md", "RUN.md"))):
        assert page.index("Q4_K_M") < page.index("IQ3_XS")
        assert advice(compared) in " ".join(page.split())


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        (
            {"Q4_K_M": 6, "IQ3_XS": 4},
            "IQ3_XS on a card of 4 GB; Q4_K_M on a card of 6 GB or more, and without a card, in main memory",
        ),
        ({"Q4_K_M": 6}, "Q4_K_M on a card of 6 GB or more, and without a card, in main memory"),
        ({"Q4_K_M": None, "IQ3_XS": 24}, "IQ3_XS on a card of 24 GB; without a card Q4_K_M"),
        ({"Q4_K_M": None}, ""),
    ],
)
def test_each_card_gets_the_file_closest_to_16_bits_that_it_holds(
    reported: Path, cards: dict[str, int | None], expected: str
) -> None:
    compared = read_as(Comparison, reported / "metrics/compare.json")
    files = {name: compared.files[name].model_copy(update={"card_gb": card}) for name, card in cards.items()}
    assert expected in advice(compared.model_copy(update={"files": files}))


def test_every_picture_says_that_the_data_are_simulated(reported: Path) -> None:
    pictures = {path.stem: path.read_text() for path in (reported / "metrics/pictures").iterdir()}
    assert pictures.keys() == {"accuracy", "confusion", "loss", "reliability", "right_label", "risk_coverage"}
    assert [name for name, svg in pictures.items() if "simulated" not in svg] == []


def test_a_refusal_leaves_the_outputs_as_they_were(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(reported, tmp_path / "project"))
    before = contents(Path())
    first, *rows = read_predictions(TUNED)["chat"]
    write_predictions(TUNED, [first._replace(label="no"), *rows])
    with pytest.raises(Fail, match="PMID 1000"):
        make()
    assert contents(Path()) == before


def test_importing_the_stage_imports_no_heavy_library() -> None:
    code = "import sys, pipeline.stages.report; assert not {'torch', 'transformers', 'vl_convert'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_summary_fits_a_terminal_and_offers_real_questions_only_after_simulated_ones(reported: Path) -> None:
    compared = read_as(Comparison, reported / "metrics/compare.json")
    text = summary.summary(compared, "", {"IQ3_XS": 12.0})
    assert max(map(len, text.splitlines())) <= 80
    shown = compared.tuned.accuracy
    assert f"{shown.value:.1%}  {shown.low:.1%} to {shown.high:.1%}" in text
    assert f"{shown.value:.1%}  {100 * shown.low:.1f}-{shown.high:.1%}" in text  # in the table of files
    assert "not medical accuracy" in " ".join(text.split())
    assert "smollm2-135m" in text
    real = summary.summary(compared.model_copy(update={"simulated": False}), "", {})
    assert "smollm2-135m" not in real
    assert "not medical accuracy" not in real


def test_the_summary_compares_with_the_last_commit_but_for_times_and_memory(project: Path) -> None:
    assert "not a git repository" in summary.committed()
    git(project, "init")
    assert "differ" in summary.committed()  # nothing is committed yet
    commit(project, "results")
    assert "equal" in summary.committed()
    Path("metrics/train_resources.json").write_text("2")
    Path("metrics/train_memory.csv").write_text("2")
    assert "equal" in summary.committed()
    Path("metrics/compare.json").write_text("2")
    assert "differ" in summary.committed()


def test_the_summary_of_an_unfinished_run_says_what_to_run(project: Path) -> None:
    with pytest.raises(Fail, match="run `make repro`"):
        summary.main()
