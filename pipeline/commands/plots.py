"""Plots: a page of every plot that needs no network; DVC's own page loads its drawing library from a CDN.

`.dvc/config` names the page's frame (`plots.html_template`), so `dvc plots show` and `dvc plots diff` fill it too.
Set-up writes it (`--frame-only`), because git need not hold 0.9 MB of Vega.
"""

from pathlib import Path

import typer

from pipeline.commands.cli import dvc
from pipeline.core.errors import Fail
from pipeline.core.outputs import writing
from pipeline.reporting.pages import render
from pipeline.reporting.plots import TEMPLATES, VEGA_LITE

FRAME = TEMPLATES / "offline.html"


def frame() -> str:
    """The page with Vega, Vega-Lite and vega-embed in it, and a place for the plots."""
    import vl_convert

    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return render("plots.html.j2", library=library)


def main(frame_only: bool = False, output: Path = Path("dvc_plots")) -> None:
    """Write OUTPUT/index.html with every plot of dvc.yaml; open it in a browser."""
    if not Path(".dvc/config").is_file():
        raise Fail("this directory is not a DVC project; run this from the project's root")
    with writing(FRAME) as partial:
        partial.write_text(frame(), encoding="utf-8")
    if frame_only:
        return
    dvc("plots", "show", "--quiet", "--html-template", str(FRAME), "--out", str(output))
    typer.echo(f"Open {output / 'index.html'} in a browser; no network is needed.")
