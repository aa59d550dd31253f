"""The project's pages as data: their fenced blocks, links, names in backticks and tables."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(ROOT.glob("docs/*.md"))
CHANGE, METRICS, HARDWARE, TROUBLES = (
    ROOT / f"docs/{page}.md" for page in ("change", "metrics", "hardware", "troubleshooting")
)
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("benchmarks/**/*.md"))]


class Block(NamedTuple):
    """A fenced block: the page and its language, the section that it stands in, and its text."""

    page: str
    language: str
    section: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str, page: str | None = None) -> list[Block]:
    """The fenced blocks of a language, of all pages or of one, in order."""
    return [
        block for path in PAGES if page in (None, name(path)) for block in fenced(path) if block.language == language
    ]


def fenced(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    section, language, lines = "", None, list[str]()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is None:
                language, lines = line[3:], []
            else:
                yield Block(name(path), language, section, "\n".join(lines) + "\n")
                language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("## "):
            section = line[3:]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def links(path: Path) -> list[str]:
    """The relative links of a page, pictures too."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def sections(path: Path) -> dict[str, str]:
    """Title -> text of a page's second-level sections."""
    parts = re.split(r"^## (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of every table in a text, without the tables' heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {number - 1 for number, row in enumerate(cells) if set("".join(row)) <= set("-: ")}
    return [row for number, row in enumerate(cells) if number not in heads and number - 1 not in heads]
