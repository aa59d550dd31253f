"""The comparison of base and tuned, and everything made of it: pictures, model card, summary."""

import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import report, summary
from pipeline.measures import COLUMNS, Prediction
from pipeline.prompt import LABELS
from pipeline.stage import Fail

PARAMS = report.Params(bootstrap_samples=10_000, seed=0, confidence=0.95)
GOLD = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55


def model(accuracy: float, seed: int, gold: list[str] = GOLD) -> list[Prediction]:
    """A model's answers, about `accuracy` of them right."""
    rng = random.Random(seed)
    rows: list[Prediction] = []
    for number, label in enumerate(gold):
        answer = label if rng.random() < accuracy else rng.choice([other for other in LABELS if other != label])
        yes, no, maybe = (-0.5 if answer == other else -2.0 for other in LABELS)
        rows.append(Prediction(str(1000 + number), label, (yes, no, maybe), answer, answer))
    return rows


@pytest.mark.parametrize(
    ("base_only", "tuned_only", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (9, 1, 0.021484375), (10, 10, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_test(base_only: int, tuned_only: int, p: float) -> None:
    assert report.mcnemar(base_only, tuned_only) == pytest.approx(p)


def test_bootstrap_of_equal_models_is_zero_wide_and_of_a_sure_gain_is_its_binomial_interval() -> None:
    base, perfect = model(0.5, 1), model(1.0, 1)
    assert report.paired_bootstrap(base, base, 1000, 0, 0.95) == {"accuracy": (0, 0), "macro_f1": (0, 0)}
    gain = sum(row.prediction != row.label for row in base) / 500
    low, high = report.paired_bootstrap(base, perfect, 20_000, 0, 0.95)["accuracy"]
    half = 1.96 * (gain * (1 - gain) / 500) ** 0.5
    assert low == pytest.approx(gain - half, abs=0.004)
    assert high == pytest.approx(gain + half, abs=0.004)


def test_bootstrap_is_paired() -> None:
    """Two models that differ on few questions have a far narrower interval than two that err independently."""
    base = model(0.7, 1)
    almost = [row._replace(prediction=row.label) if i < 20 else row for i, row in enumerate(base)]
    other = model(0.7, 2)

    def width(rows: list[Prediction]) -> float:
        low, high = report.paired_bootstrap(base, rows, 5000, 0, 0.95)["accuracy"]
        return high - low

    assert width(almost) < width(other) / 3


def test_bootstrap_depends_on_its_seed_alone() -> None:
    base, tuned = model(0.5, 1), model(0.6, 2)
    assert report.paired_bootstrap(base, tuned, 2000, 3, 0.9) == report.paired_bootstrap(base, tuned, 2000, 3, 0.9)
    assert report.paired_bootstrap(base, tuned, 2000, 3, 0.9) != report.paired_bootstrap(base, tuned, 2000, 4, 0.9)


def test_comparison_counted_by_hand() -> None:
    gold = ["yes", "yes", "no", "no", "maybe"]
    base = [
        row._replace(prediction=p) for row, p in zip(model(1, 0, gold), ["yes", "no", "yes", "yes", "yes"], strict=True)
    ]
    tuned = [row._replace(prediction=p) for row, p in zip(base, ["no", "yes", "no", "no", "yes"], strict=True)]
    figures = report.compare(base, tuned, PARAMS)
    assert (figures["base_accuracy"], figures["tuned_accuracy"], figures["accuracy_difference"]) == (0.2, 0.6, 0.4)
    assert (figures["base_only_right"], figures["tuned_only_right"], figures["mcnemar_p"]) == (1, 3, 0.625)
    assert figures["accuracy_difference_low"] <= 0.4 <= figures["accuracy_difference_high"]
    assert figures["tuned_recall_maybe"] == 0
    assert all(isinstance(value, int | float) for value in figures.values())


@pytest.mark.parametrize("change", [{"pmid": "9"}, {"label": "maybe"}])
def test_tables_of_other_questions_or_labels_are_refused(change: dict[str, str]) -> None:
    base = model(1, 0, ["yes", "no"])
    with pytest.raises(Fail, match="PMID"):
        report.compare(base, [base[0], base[1]._replace(**change)], PARAMS)


@pytest.mark.parametrize(
    ("difference", "low", "high", "words"),
    [
        (0.1, 0.05, 0.15, "more than noise, the tuned model is better"),
        (-0.1, -0.15, -0.05, "more than noise, the tuned model is worse"),
        (0.02, -0.02, 0.06, "no more than noise"),
    ],
)
def test_the_verdict_says_whether_it_is_noise(difference: float, low: float, high: float, words: str) -> None:
    figures = {"accuracy_difference": difference, "mcnemar_p": 0.01, "confidence": 0.95}
    sentence = report.verdict({**figures, "accuracy_difference_low": low, "accuracy_difference_high": high})
    assert words in sentence
    assert f"{100 * difference:+.1f} points" in sentence


INPUTS = (
    "base.csv tuned.csv baseline.json train_log.csv test.jsonl source.json manifest.json medical-reasoner.gguf".split()
)
OUTPUTS = ["compare.json", "pictures", "release"]
HUB = {"source": "hub", "repo_id": "meta-llama/Meta-Llama-3-8B-Instruct", "revision": "a" * 40, "files": []}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with every input of the stage."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("report: {bootstrap_samples: 1000, seed: 0, confidence: 0.95}\n")
    for name, rows in {"base.csv": model(0.5, 1), "tuned.csv": model(0.75, 2)}.items():
        lines = [",".join([r.pmid, r.label, *map(str, r.log_probabilities), r.prediction, r.greedy]) for r in rows]
        Path(name).write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    baselines = {
        "majority_accuracy": 0.552,
        "majority_macro_f1": 0.237,
        "tfidf_accuracy": 0.568,
        "tfidf_macro_f1": 0.358,
    }
    Path("baseline.json").write_text(json.dumps(baselines))
    Path("train_log.csv").write_text("step,loss,learning_rate,grad_norm\n1,2.5,0.1,1.0\n2,1.5,0.1,1.0\n")
    Path("test.jsonl").write_text(json.dumps({"prompt": [{"role": "system", "content": "Be brief."}]}) + "\n")
    Path("source.json").write_text(json.dumps({"simulated": True, "name": "made-up trials", "licence": "MIT"}))
    Path("manifest.json").write_text(json.dumps({"source": "tiny", "files": []}))
    Path("medical-reasoner.gguf").write_bytes(b"GGUF")
    return tmp_path


def make() -> dict[str, Any]:
    """Run the stage; the figures that it writes."""
    report.main(*map(Path, INPUTS + OUTPUTS))
    return json.loads(Path("compare.json").read_text())


def contents() -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for name in OUTPUTS for path in [Path(name), *Path(name).rglob("*")] if path.is_file()
    }


def test_figures_are_flat_and_numeric_and_files_are_the_same_twice(project: Path) -> None:
    figures = make()
    assert all(isinstance(value, int | float) for value in figures.values())
    assert (figures["gguf_bytes"], figures["simulated"], figures["tfidf_accuracy"]) == (4, True, 0.568)
    first = contents()
    make()
    assert contents() == first
    assert not any(str(project).encode() in content for content in first.values())


def test_questions_are_paired_by_pmid_whatever_their_order(project: Path) -> None:
    figures = make()
    header, *lines = Path("tuned.csv").read_text().splitlines()
    Path("tuned.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert make() == figures


def test_the_model_card_says_what_the_file_is_and_what_it_is_not_for(project: Path) -> None:
    figures = make()
    card = Path("release/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    results = YAML(typ="safe").load(front)["model-index"][0]["results"][0]
    assert [metric["value"] for metric in results["metrics"]] == [figures["tuned_accuracy"], figures["tuned_macro_f1"]]
    assert "Not for clinical use" in body
    assert "not medical accuracy" in body
    assert hashlib.sha256(b"GGUF").hexdigest() in body
    assert f"| tuned model | {figures['tuned_accuracy']:.1%} |" in body
    for picture in re.findall(r"!\[.*\]\((.*)\)", body):
        assert (Path("release") / picture).is_file()
    assert Path("release/Modelfile").read_text().startswith("FROM ../medical-reasoner.gguf\n")
    assert 'SYSTEM """Be brief."""' in Path("release/Modelfile").read_text()


def test_real_data_and_a_llama_3_base_are_named_and_licensed(project: Path) -> None:
    Path("source.json").write_text(json.dumps({"simulated": False, "name": "PubMedQA", "licence": "MIT"}))
    Path("manifest.json").write_text(json.dumps(HUB))
    make()
    card = Path("release/README.md").read_text()
    assert "simulated" not in card.lower()
    assert "Built with Meta Llama 3" in card
    assert "license: llama3\n" in card
    assert f"base_model: {HUB['repo_id']}\n" in card


def test_pictures_hold_their_words_and_say_simulated(project: Path) -> None:
    make()
    pictures = {path.stem: path.read_text() for path in Path("pictures").iterdir()}
    assert set(pictures) == {"accuracy", "confusion", "loss"}
    for words, svg in zip(
        ("Accuracy on", "What each model answers", "Training loss"), map(pictures.get, sorted(pictures)), strict=True
    ):
        assert svg
        assert words in svg
        assert "simulated" in svg
    confusion = pictures["confusion"]
    assert confusion.index("untuned base") < confusion.index("tuned model")


def test_a_refusal_leaves_the_outputs_as_they_were(project: Path) -> None:
    make()
    before = contents()
    Path("tuned.csv").write_text(Path("tuned.csv").read_text().replace("1000,yes", "1000,no"))
    with pytest.raises(Fail, match="PMID 1000"):
        make()
    assert contents() == before


def test_the_stage_runs_without_torch_and_without_importing_a_drawing_library_early(project: Path) -> None:
    code = "import sys, pipeline.report as r; assert not {'torch', 'vl_convert', 'sklearn'} & set(sys.modules)"
    root = Path(report.__file__).parents[1]
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
