"""Draw the model card and a question asked in a terminal for the README: `python -m tools.screenshots`.

Needs Debian's chromium and a finished run. Writes docs/pictures/card.png and docs/pictures/ask.png. To look at another
page, as the review comment or dvc_plots/index.html: `python -m tools.screenshots PAGE.md PICTURE.png HEIGHT`.
"""

import html
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

from pipeline.core.files import read_rows
from pipeline.core.question import Question
from pipeline.scoring.protocols import abstract_of

PICTURES = Path("docs/pictures")
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


def main() -> None:
    """Draw both pictures."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    release = Path("models/release")
    card = (release / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    draw(MarkdownIt().enable("table").render(card), release, PICTURES / "card.png", 1500)

    row = read_rows(Path("data/formatted/test.jsonl"), Question)[0]
    abstract, question = abstract_of(row), row.question
    shown = f'$ cat abstract.txt\n{abstract}\n\n$ python -m pipeline ask "{question}" --context abstract.txt\n'
    command = [sys.executable, "-m", "pipeline", "ask", question, "--context", "-"]
    shown += subprocess.run(command, input=abstract, check=True, capture_output=True, text=True).stdout
    draw(f'<pre class="terminal">{html.escape(shown)}</pre>', release, PICTURES / "ask.png", 400)


if __name__ == "__main__":
    if sys.argv[1:]:
        show(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
