"""What the pages name exists: links, files, make targets, modules, commands, keys of metrics."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import COMMANDS
from pipeline.scoring.protocols import messages
from pipeline.sections.base import BASE
from tests.conftest import ROOT, TARGETS, stages, yaml
from tests.pages import PAGES, blocks, fenced, links, name, prose, quoted

SUFFIXES = "py md yaml yml toml txt sh ipynb lock cmake".split()  # of files that are in git
ADDED = {"pipeline/stages/errors.py", "errors"}  # docs/extend.md makes them

every_page = pytest.mark.parametrize("page", PAGES, ids=name)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's titles."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_every_relative_link_leads_to_a_file_and_a_title(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def commands(page: Path) -> str:
    """What a page gives to be run: in its blocks, without comments, and in backticks."""
    lines = [
        line.partition(" #")[0] for block in fenced(page) if block.language == "sh" for line in block.text.splitlines()
    ]
    return "\n".join([*lines, *quoted(prose(page))])


@every_page
def test_every_file_of_the_project_that_is_named_exists(page: Path) -> None:
    text = commands(page)
    known = "pipeline|tests|docs|tools|benchmarks|profiles|setup|infra|notebooks|\\.github"
    paths = set(re.findall(rf"(?<![\w./-])((?:{known})/[\w./-]+\.(?:{'|'.join(SUFFIXES)}))\b", text))
    assert sorted(path for path in paths - ADDED if not (ROOT / path).exists()) == []


@every_page
def test_every_patch_applies_or_is_applied(page: Path) -> None:
    texts = [block.text for block in fenced(page) if block.language == "sh"]
    for patch in re.findall(r"^git apply <<'END'\n(.*?)^END$", "\n".join(texts), re.MULTILINE | re.DOTALL):
        git_apply = ("git", "apply", "--check")
        tried = [
            subprocess.run([*git_apply, *options], input=patch, text=True, capture_output=True, cwd=ROOT, check=False)
            for options in ((), ("--reverse",))
        ]
        assert 0 in [done.returncode for done in tried], tried[0].stderr


@every_page
def test_every_target_command_module_and_stage_exists(page: Path) -> None:
    text = commands(page)
    assert set(re.findall(r"^(?:\w+=\S+ )*make ([a-z][a-z-]*)", text, re.MULTILINE)) <= TARGETS
    assert set(re.findall(r"python3? -m pipeline ([a-z-]+)", text)) <= COMMANDS.keys()
    modules = set(re.findall(r"python3? -m ((?:pipeline|benchmarks|tools)(?:\.\w+)+)", text))
    assert [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").is_file()] == []
    assert set(re.findall(r"dvc repro(?: -[-\w]+)* ([a-z]+)$", text, re.MULTILINE)) <= {*stages(ROOT), *ADDED}


def flat(values: dict[str, Any], path: str = "") -> Iterator[str]:
    """The dotted names of all leaves."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def test_the_page_of_metrics_names_every_key_of_the_comparison(micro: Path) -> None:
    lines = (ROOT / "docs/metrics.md").read_text(encoding="utf-8").splitlines()
    keys = {key for line in lines if line.startswith("|") for key in quoted(line.split("|")[1])}
    patterns = [re.sub(r"<\w+>", "[^.]+", key.replace(".", r"\.")) for key in keys]
    written = flat(json.loads((micro / "metrics/compare.json").read_text(encoding="utf-8")))
    assert [key for key in written if not any(re.fullmatch(pattern, key) for pattern in patterns)] == []


def test_the_sections_on_the_page_of_bases_are_ones_that_base_takes() -> None:
    found = [yaml.load(block.text)["base"] for block in blocks("yaml", "docs/base.md")]
    assert {BASE.validate_python(values).source for values in found} == {"hub", "local"}


def test_the_documented_client_asks_in_the_words_of_the_prompt() -> None:
    example = blocks("python", "docs/serve.md")[0].text
    assignments = [node for node in ast.parse(example).body if isinstance(node, ast.Assign)]
    names, found = {"system", "question", "user", "messages"}, dict[str, Any]()
    exec("\n".join(ast.unparse(node) for node in assignments if ast.unparse(node.targets[0]) in names), {}, found)
    system_prompt = yaml.load(ROOT / "profiles/tiny.yaml")["format"]["system_prompt"]
    assert found["messages"] == messages(system_prompt, "Does belacine reduce knee pain?", "PASTE IT HERE")
