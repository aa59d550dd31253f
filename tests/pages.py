"""The project's pages as data: their fenced blocks, links, names in backticks and tables."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))


class Block(NamedTuple):
    """A fenced block: its language, the second-level section that it stands in, and its text."""

    language: str
    section: str
    text: str


def name(page: Path) -> str:
    """The page's path in the project."""
    return page.relative_to(ROOT).as_posix()


def fenced(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    parts = re.split(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section, body in zip(["", *parts[1::2]], parts[::2], strict=True):
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL):
            yield Block(language, section, text)


def blocks(language: str, page: str, section: str = "") -> list[Block]:
    """The blocks of a language on a page, or in one of its sections."""
    return [block for block in fenced(ROOT / page) if block.language == language and section in ("", block.section)]


def commands(page: str, section: str = "") -> str:
    """The shell commands of a page or a section, for a shell that stops at the first error."""
    found = [block.text for block in blocks("sh", page, section)]
    assert found, (page, section)
    return "set -e\n" + "".join(found)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def links(page: Path) -> list[str]:
    """The relative links of a page, pictures too."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
