"""Draw pictures for the README. Needs Debian's chromium and a finished run.

python -m tools.screenshots                             the model card: docs/pictures/card.png
python -m tools.screenshots FILE.gguf                   a question about a made-up abstract: docs/pictures/ask.png
python -m tools.screenshots PAGE.md PICTURE.png HEIGHT  another page, as the review comment or dvc_plots/index.html
"""

import html
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

PICTURES = Path("docs/pictures")
ASKED = "Does belacine relieve pain in knee osteoarthritis?"
ABSTRACT = (
    "We randomly assigned 214 adults with knee osteoarthritis to belacine 20 mg or placebo, once a day for 12 weeks. "
    "The primary outcome was the change in pain on a scale of 0 to 100. Pain fell by 31.4 points with belacine and by "
    "18.9 points with placebo (difference 12.5, 95% CI 7.9 to 17.1; P<0.001). Stiffness and use of rescue analgesics "
    "fell as well. Headache was reported by 9% and 7% of the patients."
)
STYLE = """body { font: 15px/1.5 sans-serif; margin: 24px; width: 860px } img { max-width: 100% }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: 3px 9px }
pre.terminal { background: #1d1f21; color: #e0e0e0; padding: 18px; white-space: pre-wrap }"""


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Draw an HTML page; its scripts have ten seconds."""
    command = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files"]
    size = [f"--window-size={width},{height}", f"--screenshot={picture.resolve()}", "--virtual-time-budget=10000"]
    subprocess.run([*command, *size, page.resolve().as_uri()], check=True, capture_output=True)


def draw(body: str, beside: Path, picture: Path, height: int) -> None:
    """Draw a page whose relative links begin at the directory `beside`, 920 pixels wide."""
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "page.html"
        head = f'<meta charset="utf-8"><base href="{beside.resolve().as_uri()}/"><style>{STYLE}</style>'
        page.write_text(head + body, encoding="utf-8")
        photograph(page, picture, 920, height)


def show(page: Path, picture: Path, height: int) -> None:
    """Draw a Markdown page, whose links begin at the working directory, or an HTML page."""
    if page.suffix == ".md":
        draw(MarkdownIt().enable("table").render(page.read_text(encoding="utf-8")), Path(), picture, height)
    else:
        photograph(page, picture, 1500, height)


def ask(gguf: Path) -> None:
    """Draw a question that is asked of a model in a terminal."""
    shown = f'$ cat abstract.txt\n{ABSTRACT}\n\n$ python -m pipeline ask "{ASKED}" --context abstract.txt\n'
    command = [sys.executable, "-m", "pipeline", "ask", ASKED, "--context", "-", "--gguf", str(gguf)]
    shown += subprocess.run(command, input=ABSTRACT, check=True, capture_output=True, text=True).stdout
    draw(f'<pre class="terminal">{html.escape(shown)}</pre>', Path(), PICTURES / "ask.png", 430)


def main() -> None:
    """Draw the model card."""
    release = Path("models/release")
    card = (release / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    draw(MarkdownIt().enable("table").render(card), release, PICTURES / "card.png", 1500)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    match sys.argv[1:]:
        case []:
            main()
        case [gguf]:
            ask(Path(gguf))
        case [page, picture, height]:
            show(Path(page), Path(picture), int(height))
        case _:
            sys.exit(__doc__)
