"""The plots of dvc.yaml draw, and draw with no network, from files of the shapes that the stages write."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from pipeline.commands import plots
from pipeline.core.stage import Fail, remove
from pipeline.scoring.measures import COLUMNS

ROOT = Path(__file__).parents[2]
PLOTS = 9  # label balance, token lengths, training, memory, three confusion matrices, reliability, risk-coverage
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def rows(vram: float) -> dict[str, list[str]]:
    """Each plotted file's lines, as the stages write them."""
    rng = random.Random(0)
    labels = {"yes": 28, "no": 17, "maybe": 5}
    splits = ("train", "validation", "test")
    asked = [(label, rng.choice(list(labels))) for label, count in labels.items() for _ in range(count)]
    answers = [f"chat,{i},{label},-1.0,-1.0,-1.0,{answer},{answer},7" for i, (label, answer) in enumerate(asked)]
    # What another protocol answers is not in the picture.
    others = [f"lm_eval,{i},{label},-1.0,-1.0,-1.0,{label},,7" for i, (label, _) in enumerate(asked)]
    table = [",".join(COLUMNS), *answers, *others]
    return {
        "label_balance.csv": [
            "split,label,questions",
            *(f"{s},{label},{n}" for s in splits for label, n in labels.items()),
        ],
        "token_lengths.csv": ["split,tokens", *(f"{s},{rng.randint(200, 700)}" for s in splits for _ in range(40))],
        "train_log.csv": ["step,loss,learning_rate,grad_norm", *(f"{i},{3 / i},{1e-4 * i},1.5" for i in range(1, 9))],
        "train_memory.csv": [
            "step,rss_mib,vram_allocated_mib,vram_reserved_mib",
            *(f"{i},900.5,{vram},{vram * 1.1}" for i in range(1, 9)),
        ],
        "predictions/base.csv": table,
        "predictions/merged.csv": table,
        "predictions/tuned.csv": table,
        "reliability.csv": [
            "model,low,high,questions,confidence,accuracy",
            *(
                f"{m},{i / 10},{i / 10 + 0.1},9,{i / 10 + 0.05},{i / 11}"
                for m in ("tuned", "base")
                for i in range(4, 9)
            ),
        ],
        "risk_coverage.csv": [
            "model,coverage,risk",
            *(f"{m},{i / 50},{i / 200}" for m in ("tuned", "base") for i in range(1, 51)),
        ],
    }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with this one's dvc.yaml, configuration and templates, and synthetic metrics."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True)
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    shutil.copyfile(ROOT / "profiles/micro.yaml", "params.yaml")  # dvc.yaml's artifact names parameters
    shutil.copyfile(ROOT / ".dvc/config", ".dvc/config")
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.no_scm", "true"], check=True)
    shutil.copytree(ROOT / ".dvc/plots", ".dvc/plots", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.html"))
    for name, lines in rows(vram=5000.0).items():
        path = Path("metrics", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    pictures = Path("metrics/pictures")
    pictures.mkdir()
    (pictures / "accuracy.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    return tmp_path


def drawn() -> dict[str, str]:
    """The SVG of every plot, by its file's name."""
    show = [sys.executable, "-m", "dvc", "plots", "show", "--json"]
    output: dict[str, Any] = json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    assert "errors" not in output
    plotted = {name: plot for name, revisions in output["data"].items() for plot in revisions}
    specs = {name: plot["content"] for name, plot in plotted.items() if plot["type"] == "vega"}
    return {Path(name).name: vl_convert.vegalite_to_svg(spec, vl_version="5.21") for name, spec in specs.items()}


def test_every_plot_has_a_title_named_axes_and_marks(project: Path) -> None:
    svgs = drawn()
    assert len(svgs) == PLOTS
    words = {
        "label_balance.csv": ["Questions by label", "maybe", "validation", ">17<"],
        "token_lengths.csv": ["tokens", "questions", "validation"],
        "train_log.csv": ["loss", "learning rate", "gradient norm", "step"],
        "train_memory.csv": ["MiB", "VRAM reserved", "step"],
        "base.csv": ["Untuned base", "gold label", "maybe"],
        "merged.csv": ["Tuned model at 16 bits", "gold label", "maybe"],
        "tuned.csv": ["Tuned model", "gold label", "maybe"],
        "reliability.csv": ["as often as it is sure", "probability of the decision", "right", "base"],
        "risk_coverage.csv": ["abstaining", "questions answered", "of these, wrong", "base"],
    }
    for name, expected in words.items():
        assert not [word for word in expected if word not in svgs[name]], name
        assert "undefined" not in svgs[name]
        assert "NaN" not in svgs[name]
    assert svgs["train_memory.csv"].count('role="graphics-symbol" aria-roledescription="line mark"') == 3


def test_no_vram_is_no_line(project: Path) -> None:
    Path("metrics/train_memory.csv").write_text("\n".join(rows(vram=0.0)["train_memory.csv"]) + "\n")
    assert drawn()["train_memory.csv"].count('role="graphics-symbol" aria-roledescription="line mark"') == 1


def test_other_protocols_are_not_in_the_confusion_matrix(project: Path) -> None:
    def picture() -> str:
        return re.sub(r"gradient_\d+", "", drawn()["tuned.csv"])

    before = picture()
    table = Path("metrics/predictions/tuned.csv")
    table.write_text("".join(line for line in table.open() if not line.startswith("lm_eval")))
    assert picture() == before


def test_a_model_that_was_not_measured_leaves_the_other_plots_alone(project: Path) -> None:
    Path("metrics/predictions/merged.csv").write_text(",".join(COLUMNS) + "\n")
    assert len(drawn()) == PLOTS - 1


def test_the_page_holds_its_library_and_loads_nothing(project: Path) -> None:
    plots.main()
    page = Path("dvc_plots/index.html").read_text()
    assert page.count("vegaEmbed('#") == PLOTS
    assert "static/" in page  # the pictures
    assert "{plot_divs}" not in page
    assert "<script src" not in page
    assert "cdn" not in page
    assert sum(map(len, page.split("</script>")[:1])) > 500_000


def test_dvc_itself_draws_with_the_frame(project: Path) -> None:
    plots.main(frame_only=True)
    assert not Path("dvc_plots").exists()
    subprocess.run([sys.executable, "-m", "dvc", "plots", "show", "--quiet"], check=True)
    assert "cdn" not in Path("dvc_plots/index.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_browser_with_no_network_draws_every_plot(project: Path) -> None:
    plots.main()
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={project / 'profile'}"]
    page = (project / "dvc_plots/index.html").as_uri()
    command = [str(CHROMIUM), *flags.split(), *offline, "--virtual-time-budget=10000", "--dump-dom", page]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert dom.count('class="marks"') == PLOTS


def test_outside_a_project_it_is_one_sentence(project: Path) -> None:
    remove(Path(".dvc"))
    with pytest.raises(Fail, match="project's root"):
        plots.main()
