"""The pages say what is so: keys of metrics, figures, error sentences, paths, parameters, commands and hooks exist."""

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, stages, yaml
from pages import HARDWARE, LINKED, METRICS, PAGES, TROUBLES, blocks, links, name, prose, quoted, rows, sections

from pipeline.scoring.protocols import chat

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
STAGES = stages(ROOT)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
RESULTS = {
    key: row["value"] for key, row in json.loads((ROOT / "benchmarks/results.json").read_text(encoding="utf-8")).items()
}
HOOKS = [hook for repo in yaml.load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]

every_page = pytest.mark.parametrize("page", PAGES, ids=name)


# Metrics: the page has every key that a run writes, and no other

PLACEHOLDERS = {
    "<model>": "base|tuned|merged",
    "<protocol>": "chat|lm_eval|question_only",
    "<label>": "yes|no|maybe",
    "<gold>": "yes|no|maybe",
    "<pair>": "tuned_minus_base|merged_minus_base|tuned_minus_merged",
}


def flat(values: dict[str, Any], path: str = "") -> set[str]:
    """The dotted names of all leaves."""
    return {
        leaf
        for key, value in values.items()
        for leaf in (flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}"})
    }


def keys_written(path: Path) -> set[str]:
    """A JSON file's keys, a table's columns, a directory's files."""
    if path.is_dir():
        return {file.name for file in path.iterdir()}
    text = path.read_text(encoding="utf-8")
    return flat(json.loads(text)) if path.suffix == ".json" else set(text.partition("\n")[0].split(","))


def explained(title: str) -> set[str]:
    """The keys, or patterns of keys, in the first column of a section's table."""
    return {key for row in rows(sections(METRICS)[title]) for key in quoted(row[0])}


def pattern(key: str) -> str:
    for placeholder, choices in PLACEHOLDERS.items():
        key = key.replace(placeholder, f"({choices})")
    return key


# Sections whose title is not the file that they explain.
PLACES = {
    "What a stage cost": "metrics/*_resources.json",
    "Predictions": "metrics/predictions/*.csv",
    "Pictures": "metrics/pictures",
}


def test_every_file_of_metrics_has_a_section(micro: Path) -> None:
    titles = [PLACES.get(title, title) for title in sections(METRICS)]
    found = [path for path in micro.glob("metrics/**/*") if path.is_file() and path.name != ".gitignore"]
    left = [path for path in found if not any(path.relative_to(micro).match(f"{title}*") for title in titles)]
    assert [path for path in left if path.parent.name != "pictures"] == []


@pytest.mark.parametrize("title", [title for title in sections(METRICS) if title in PLACES or "/" in title])
def test_every_key_that_a_run_writes_is_explained_and_no_other(title: str, micro: Path) -> None:
    keys = explained(title)
    files = list(micro.glob(PLACES.get(title, title)))
    assert files
    written = set[str]().union(*map(keys_written, files))
    recorded = set[str]().union(
        *map(keys_written, (ROOT / "benchmarks/runs/tiny-pubmedqa").glob(PLACES.get(title, title)))
    )
    unexplained = {key for key in written if not any(re.fullmatch(pattern(one), key) for one in keys)}
    assert sorted(unexplained) == [], f"docs/metrics.md, {title}"
    # The micro model can be so bad that nothing is gained or lost; a finished run of another profile has the key then.
    never = {key for key in keys if not any(re.fullmatch(pattern(key), one) for one in written | recorded)}
    assert sorted(never) == [], f"docs/metrics.md, {title}: no run writes it"


# Hardware: measured figures, by their key


def measured_rows(page: Path) -> list[list[str]]:
    return [row for row in rows(page.read_text(encoding="utf-8")) if len(row) == 3 and re.fullmatch(r"`\S+`", row[2])]


@pytest.mark.parametrize("row", measured_rows(HARDWARE), ids=lambda row: quoted(row[2])[0])
def test_a_figure_is_the_one_that_was_measured(row: list[str]) -> None:
    shown, (key,) = row[1].split()[0].replace(",", ""), quoted(row[2])
    assert key in RESULTS, f"docs/hardware.md: benchmarks/results.json has no {key}"
    decimals = len(shown.partition(".")[2])
    assert f"{RESULTS[key]:.{decimals}f}" == shown, f"docs/hardware.md: {key} is {RESULTS[key]} now"


def test_no_figure_stands_there_without_its_key() -> None:
    before, generated = HARDWARE.read_text(encoding="utf-8").split("<!-- card: written by benchmarks/record.py -->")
    page = before + generated.partition("<!-- end of card -->")[2]
    for row in measured_rows(HARDWARE):
        page = page.replace(row[1], "", 1)
    sizes = set(re.findall(r"\b\d[\d,.]* (?:GiB|GB|MB|s|tokens/s)\b", page))
    assert sizes <= {"4 GB", "6 GB", "8 GB", "16 GB", "24 GB"}  # what a card is called, and the weights' download


# Troubleshooting: sentences that are still said


@functools.cache
def said_by_us() -> list[str]:
    """Every string of pipeline/, setup/install.sh and the Makefile, with … for what is filled in."""
    found: list[str] = []
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    shell = (ROOT / "setup/install.sh").read_text(encoding="utf-8") + MAKEFILE
    shell = re.sub(r'"\s*\\\n\s*"', " ", shell)
    found += re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", "…", shell).splitlines()
    return found


@functools.cache
def said_by_dvc() -> list[str]:
    import dvc
    import scmrepo  # DVC's way to git

    folders = [Path(package.__file__).parent for package in (dvc, scmrepo)]
    return ["\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))]


def sentences(title: str) -> list[str]:
    return re.findall(r"^- `([^`]+)`", sections(TROUBLES)[title], re.MULTILINE)


def is_said(sentence: str, texts: list[str]) -> bool:
    """Whether one text has the parts of a sentence between its placeholders, in their order."""
    parts = [re.escape(part) for part in sentence.split("…")]
    found = re.compile(".{0,80}?".join(parts))
    return any(found.search(text) for text in texts)


@pytest.mark.parametrize(("title", "sentence"), [(title, s) for title in sections(TROUBLES) for s in sentences(title)])
def test_an_error_sentence_is_one_that_is_said(title: str, sentence: str) -> None:
    assert len(sentence.replace("…", "")) >= 12, "too short to be found by"
    texts = said_by_dvc() if title == "DVC's own" else said_by_us()
    assert is_said(sentence, texts), "no such sentence any more: correct docs/troubleshooting.md"


def test_every_sentence_stands_alone_in_its_entry() -> None:
    page = TROUBLES.read_text(encoding="utf-8")
    found = [sentence for title in sections(TROUBLES) for sentence in sentences(title)]
    assert len(re.findall(r"^- ", page, re.MULTILINE)) == len(found) == len(set(found))


# Names: links, paths, parameters, targets


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_every_page_is_linked_from_another() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    assert [name(page) for page in PAGES if page.name != "README.md" and page not in linked] == []


SUFFIXES = "py md yaml yml json jsonl csv svg txt toml lock sh ipynb gguf safetensors jinja cmake html".split()
# Of another place, or of the examples in docs/change.md.
ELSEWHERE = {"../my-questions.csv", "../shared/pubmedqa", "pipeline/stages/errors.py", "origin/main"}
# A run makes them, and no test has to.
MADE = {".checkpoints/", ".dvc/cache", ".venv/bin/python", ".venv/setup.log", ".venv/bin/dvc"}
EXAMPLES = {"train.adam_beta2", "errors", "pipeline.stages.errors"}
SECTIONS = "|".join(yaml.load(ROOT / "profiles/micro.yaml"))


def leaves(values: Any, path: str = "") -> set[str]:
    """The dotted names of nested mappings and of what they hold."""
    if not isinstance(values, dict):
        return {path}
    return {path} | {leaf for key, value in values.items() for leaf in leaves(value, f"{path}.{key}".strip("."))}


PARAMETERS = set[str]().union(*(leaves(yaml.load(profile)) for profile in PROFILES))


def is_path(text: str) -> bool:
    return bool(re.fullmatch(r"[\w.*<>{},/-]+", text)) and (
        "/" in text or (text.rpartition(".")[2] in SUFFIXES and "." in text)
    )


def exists(text: str, page: Path, run: Path) -> bool:
    """Whether a path is in the project or in a finished run, from its root or beside what the page is about."""
    if braces := re.fullmatch(r"(.*)\{(.*)\}(.*)", text):
        return all(exists(f"{braces[1]}{part}{braces[3]}", page, run) for part in braces[2].split(","))
    wanted = re.sub(r"<[^>]*>", "*", text).strip("/")
    places = [
        run,
        *(run / place for place in ("metrics", "metrics/pictures", "models/base")),
    ]
    places += [page.parent, *(ROOT / place for place in ("", "benchmarks", ".github/workflows", "infra"))]
    return any(any(place.glob(wanted)) for place in places)


@every_page
def test_every_path_that_is_named_exists(page: Path, micro: Path) -> None:
    named = {text for text in quoted(prose(page)) if is_path(text)} - ELSEWHERE - MADE
    assert sorted(text for text in named if not exists(text, page, micro)) == []


@every_page
def test_every_parameter_that_is_named_exists(page: Path) -> None:
    named = (re.match(rf"({SECTIONS})\.[a-z0-9_.]+", text) for text in quoted(prose(page)) if not is_path(text))
    keys = {key for row in rows(METRICS.read_text(encoding="utf-8")) for key in quoted(row[0])} | RESULTS.keys()
    assert sorted({found[0] for found in named if found} - PARAMETERS - keys - EXAMPLES) == []


def commands(page: Path) -> str:
    """What a page gives to be run: in its blocks without their comments, and in backticks."""
    lines = [line.partition("#")[0] for block in blocks("sh", name(page)) for line in block.text.splitlines()]
    return "\n".join([*lines, *quoted(prose(page))])


@every_page
def test_every_target_module_and_stage_of_a_command_exists(page: Path) -> None:
    text = commands(page)
    assert set(re.findall(r"^make ([a-z][a-z-]*)", text, re.MULTILINE)) <= TARGETS
    modules = set(re.findall(r"python3? -m ((?:pipeline|benchmarks)(?:\.\w+)+)", text)) - EXAMPLES
    assert [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").is_file()] == []
    assert set(re.findall(r"dvc repro(?: -[-\w]+)* ([a-z]+)$", text, re.MULTILINE)) <= {*STAGES, *EXAMPLES}


# CONTRIBUTING, and the hooks that it installs


def test_the_map_names_every_module() -> None:
    page = sections(ROOT / "CONTRIBUTING.md")["Where things are"]
    modules = {path.stem for path in (ROOT / "pipeline").rglob("*.py")} - {"__init__", "tiny", "trials", "tokenizer"}
    assert sorted(modules - set(quoted(page))) == []


def test_contributing_fits_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_the_hooks_are_what_make_check_runs_in_its_order() -> None:
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert [hook["entry"] for hook in HOOKS] == [line.strip() for line in recipe.splitlines()]


def test_the_hooks_fetch_nothing() -> None:
    assert {repo["repo"] for repo in yaml.load(ROOT / ".pre-commit-config.yaml")["repos"]} == {"local"}
    assert {hook["language"] for hook in HOOKS} == {"system"}


# The prompt that README gives to other programs


def test_the_example_for_programs_asks_in_the_words_of_the_prompt() -> None:
    (example,) = [block.text for block in blocks("python", "README.md")]
    (messages,) = [
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "messages"
    ]
    system_prompt = yaml.load(ROOT / "profiles/tiny.yaml")["format"]["system_prompt"]
    assert messages == chat(system_prompt, "Does belacine reduce knee pain?", "PASTE IT HERE")
