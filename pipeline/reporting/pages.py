"""Filling the Jinja templates of pages and comments, which are in `templates`, and tables for a terminal."""

from pathlib import Path
from typing import Any

from pipeline.reporting.comparison import points

DIRECTORY = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The text of a template; raises if it names a value that is not given. Values in HTML pages are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(DIRECTORY),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.j2"], default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": "{:.1%}".format, "points": points}
    return environment.get_template(template).render(values)


def aligned(rows: list[list[str]]) -> list[str]:
    """A line of text for each row: columns of equal width, the first one aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]
