"""The plots of dvc.yaml are drawn, and drawn with no network, from files of the shapes that the stages write."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from ruamel.yaml import YAML

from pipeline.commands import plots
from pipeline.core.errors import Fail
from pipeline.core.labels import LABELS
from pipeline.core.outputs import remove, write_csv
from pipeline.reporting.compare import compare
from pipeline.reporting.plots import VEGA_LITE, make_curves, png, write_curves
from pipeline.scoring.predictions import Prediction, write_predictions
from tests.conftest import dvc_here
from tests.tables import REPORT, ROOT, SUBJECT, facts, model

STAGES: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
FILE = "metrics/predictions/files/IQ3_XS.csv"  # of a directory with one for each further GGUF
PLOTS = {
    path if path.endswith(".csv") else FILE: properties
    for stage in STAGES.values()
    for plot in stage.get("plots", [])
    for path, properties in plot.items()
    if path.endswith(".csv") or FILE.startswith(path)
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LINE = 'aria-roledescription="line mark"'


def write_metrics(directory: Path, vram: float = 5000.0) -> None:
    """Every plotted file, as the stages write it."""
    rng = random.Random(0)
    splits, steps = ("train", "validation", "test"), range(1, 9)
    base, tuned = model(0.5, 1), model(0.8, 2)
    curves = make_curves(base, tuned, compare(SUBJECT, {"chat": base}, {"chat": tuned}, {}, facts(tuned), REPORT), 10)
    write_curves(curves, directory / "curves")
    for name, rows in {"base": base, "merged": tuned, "tuned": tuned, "files/IQ3_XS": tuned}.items():
        write_predictions(directory / f"predictions/{name}.csv", rows)
    write_csv(
        directory / "label_balance.csv",
        ["split", "label", "questions"],
        [(split, label, 17) for split in splits for label in LABELS],
    )
    lengths = [(split, rng.randint(200, 700)) for split in splits for _ in range(40)]
    write_csv(directory / "token_lengths.csv", ["split", "tokens"], lengths)
    log = [(i, 3 / i, 2.0 if i == 8 else "", 1e-4 * i, 1.5) for i in steps]
    for phase in ("train", "pretrain"):
        columns = ["step", "loss", "validation_loss", "learning_rate", "grad_norm"]
        write_csv(directory / f"{phase}_log.csv", columns, log)
    memory = [(i, 900.5, vram, vram * 1.1) for i in steps]
    columns = ["step", "rss_mib", "vram_allocated_mib", "vram_reserved_mib"]
    for phase in ("train", "pretrain"):
        write_csv(directory / f"{phase}_memory.csv", columns, memory)


def write_project() -> None:
    """Make the working directory a DVC project with this one's dvc.yaml and templates, and made-up metrics."""
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    shutil.copyfile(ROOT / "profiles/micro.yaml", "params.yaml")  # dvc.yaml names parameters
    shutil.copytree(ROOT / ".dvc/plots", ".dvc/plots", ignore=shutil.ignore_patterns("*.html"))
    Path(".dvc/config").write_text((ROOT / ".dvc/config").read_text().replace("[core]", "[core]\n    no_scm = true"))
    write_metrics(Path("metrics"))
    picture = Path("metrics/pictures/accuracy.svg")
    picture.parent.mkdir()
    picture.write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Such a project, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_project()
    return tmp_path


def specs() -> dict[str, dict[str, Any]]:
    """The Vega-Lite of every plot as DVC fills it, by its file."""
    output: dict[str, Any] = json.loads(dvc_here("plots", "show", "--json"))
    assert "errors" not in output
    shown = {name: plot for name, revisions in output["data"].items() for plot in revisions}
    return {name: plot["content"] for name, plot in shown.items() if plot["type"] == "vega"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """`specs` of such a project."""
    with contextlib.chdir(tmp_path_factory.mktemp("plots")):
        write_project()
        return specs()


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """`specs` where every answer is right, and no VRAM, validation loss or 16-bit model was measured."""
    with contextlib.chdir(tmp_path_factory.mktemp("plots")):
        write_project()
        write_metrics(Path("metrics"), vram=0.0)
        Path("metrics/train_log.csv").write_text("step,loss,learning_rate,grad_norm\n1,2.5,0.1,1.0\n2,1.5,0.1,1.0\n")
        rows = model(1.0, 1)
        wrong = [row._replace(protocol="lm_eval", greedy="", prediction="no") for row in rows]
        wrong = [Prediction(*row[:3], (-2.0, -0.5, -2.0), *row[4:]) for row in wrong]
        write_predictions(Path("metrics/predictions/tuned.csv"), [*rows, *wrong])
        write_predictions(Path("metrics/predictions/merged.csv"), [])
        return specs()


def draw(spec: dict[str, Any]) -> str:
    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)


def with_revisions(spec: dict[str, Any], revisions: int) -> dict[str, Any]:
    """A filled plot as `dvc plots diff` fills it for so many revisions with equal figures."""
    names = [f"rev{number}" for number in range(revisions)]
    text = json.dumps(spec).replace('"domain": ["workspace"]', f'"domain": {json.dumps(names)}')
    filled = json.loads(text)
    filled["data"]["values"] = [{**row, "rev": name} for name in names for row in filled["data"]["values"]]
    return filled


def test_every_plot_is_drawn_and_says_what_its_data_are(filled: dict[str, dict[str, Any]]) -> None:
    svgs = {name: draw(spec) for name, spec in filled.items()}
    assert svgs.keys() == PLOTS.keys()
    for name, svg in svgs.items():
        assert f"data: {'none' if 'pretrain' in name else 'simulated'}" in svg, name
        assert "undefined" not in svg, name
        assert "NaN" not in svg, name
        assert "1e+" not in svg, name
    assert len({re.sub(r"gradient_\d+", "", svg) for svg in svgs.values()}) == len(svgs)
    assert svgs["metrics/train_memory.csv"].count(LINE) == 3


def test_plots_of_three_revisions_name_or_colour_each(filled: dict[str, dict[str, Any]]) -> None:
    for name, spec in filled.items():
        svg = draw(with_revisions(spec, 3))
        assert all(f">rev{number}<" in svg for number in range(3)), name


def test_confusion_shows_cells_without_questions_and_no_other_protocol(others: dict[str, dict[str, Any]]) -> None:
    svg = draw(others["metrics/predictions/tuned.csv"])
    assert svg.count(">0 (0%)<") == 6
    assert all(f">{count} (100%)<" in svg for count in (276, 169, 55))


def test_no_vram_is_no_panel_and_no_validation_loss_no_line(others: dict[str, dict[str, Any]]) -> None:
    assert draw(others["metrics/train_memory.csv"]).count(LINE) == 1
    assert draw(others["metrics/train_log.csv"]).count(LINE) == 3


def test_a_model_that_was_not_measured_leaves_the_other_plots_alone(others: dict[str, dict[str, Any]]) -> None:
    assert others.keys() == PLOTS.keys() - {"metrics/predictions/merged.csv"}


def test_the_page_holds_its_library_and_loads_nothing_and_dvc_fills_it_too(project: Path) -> None:
    plots.main(frame_only=True)
    assert not Path("dvc_plots").exists()
    dvc_here("plots", "show", "--quiet")
    page = Path("dvc_plots/index.html").read_text()
    assert page.count("vegaEmbed('#") == len(PLOTS)
    assert "static/" in page  # the pictures
    assert not re.search(r"{plot_divs}|<script src|cdn", page)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_browser_with_no_network_draws_every_plot(project: Path) -> None:
    plots.main()
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={project / 'profile'}"]
    page = (project / "dvc_plots/index.html").as_uri()
    command = [str(CHROMIUM), *flags.split(), *offline, "--virtual-time-budget=10000", "--dump-dom", page]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert dom.count('class="marks"') == len(PLOTS)


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(project: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "plots"]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        while not plots.FRAME.is_file():  # then DVC draws
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate()[1] == "plots: interrupted; run the same command again\n"


def test_outside_a_project_it_is_one_sentence(project: Path) -> None:
    remove(Path(".dvc"))
    with pytest.raises(Fail, match="project's root"):
        plots.main()


def chunks_of(image: bytes) -> dict[bytes, bytes]:
    """Kind -> data of each chunk of a PNG, whose checksums must be right; pixels decompressed."""
    found: dict[bytes, bytes] = {}
    rest = image.removeprefix(b"\x89PNG\r\n\x1a\n")
    while rest:
        (length,) = struct.unpack_from(">I", rest)
        kind, data, checksum = struct.unpack_from(f">4s{length}sI", rest, 4)
        assert checksum == zlib.crc32(kind + data)
        found[kind] = found.get(kind, b"") + data
        rest = rest[12 + length :]
    return found | {b"IDAT": zlib.decompress(found[b"IDAT"])}


def test_a_picture_of_the_model_card_is_small_and_has_all_its_pixels():
    field = {"field": "a", "type": "quantitative"}
    bars = {"data": {"values": [{"a": 1}, {"a": 2}]}, "mark": "bar", "encoding": {"x": field, "y": field}}
    drawn, kept = vl_convert.vegalite_to_png(bars, vl_version=VEGA_LITE, scale=1.25), png(bars)
    assert len(kept) < len(drawn) / 2
    assert list(chunks_of(kept).items()) == list(chunks_of(drawn).items())
