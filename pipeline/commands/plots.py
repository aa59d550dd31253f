"""Plots: a page of every plot that needs no network, where DVC's own loads its drawing library from a CDN.

`.dvc/config` names the page's frame, `plots.html_template = plots/offline.html`, so `dvc plots show` and
`dvc plots diff` fill it too. Set-up writes it (`--frame-only`): 0.9 MB of Vega that git need not hold.
"""

import subprocess
import sys
from pathlib import Path

import typer

from pipeline.core.stage import Fail, run, writing

FRAME = Path(".dvc/plots/offline.html")

# DVC puts the plots in place of {plot_divs}; its script tags for the CDN would come in place of {scripts}.
HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>medical-reasoner: plots</title>
<style>
body {{ font-family: Arial, Helvetica, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
body > div {{ margin-bottom: 2.5rem; }}
img {{ max-width: 100%; }}
</style>
<script>{library}</script>
</head>
<body>
<h1>medical-reasoner</h1>
{{plot_divs}}
</body>
</html>
"""


def frame() -> str:
    """The page with Vega, Vega-Lite and vega-embed in it, and a place for the plots."""
    import vl_convert

    return HTML.format(library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version="5.21"))


def main(frame_only: bool = False, output: Path = Path("dvc_plots")) -> None:
    """Write OUTPUT/index.html, with every plot of dvc.yaml; open it in a browser."""
    if not Path(".dvc/config").is_file():
        raise Fail("this directory holds no DVC project; run this from the project's root")
    with writing(FRAME) as partial:
        partial.write_text(frame(), encoding="utf-8")
    if not frame_only:
        show = [sys.executable, "-m", "dvc", "plots", "show", "--quiet", "--html-template", str(FRAME)]
        if subprocess.run([*show, "--out", str(output)], check=False).returncode != 0:
            raise Fail("dvc could not draw the plots; its lines above say why; run `dvc plots show` by itself")
        typer.echo(f"Open {output / 'index.html'} in a browser; no network is needed.")


if __name__ == "__main__":
    run(main)
