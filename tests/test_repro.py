"""What `dvc repro` runs again after an edit: the stages that the edit can change, and no others.

The tables come from dvc.yaml and from the imports of the code; a few rows that matter to users are written out.
"""

import contextlib
import functools
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, dvc_here, repro, run_command, set_params, stages, yaml
from tests.test_dvc_yaml import PROJECT, STAGES, data_dependencies, extras_listed, sections_listed, written
from tools.dependencies import dependencies

MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("[a-z]*.py"))
FILES = sorted({path for stage in STAGES for kind in ("outs", "metrics", "plots") for path in written(stage, kind)})
TRACKED = sorted({extra for stage in STAGES for extra in extras_listed(stage)})


def leaves(values: Any, path: str = "") -> Iterator[str]:
    """The dotted path of every value in nested mappings; a list is one value."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}".strip("."))
    else:
        yield path


LEAVES = list(leaves(yaml.load(ROOT / "profiles/micro.yaml")))


def other(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case list():
            return [other(value[0]), *value[1:]]
        case _:
            return f"{value} "


def read_by(leaf: str) -> set[str]:
    """The stages whose `params` in dvc.yaml list a parameter or its section."""
    names = {leaf, f"{leaf}.0", leaf.partition(".")[0]}  # of a list, a stage may read the first value alone
    return {stage for stage in STAGES if names & sections_listed(stage)}


def imported_by(module: str) -> set[str]:
    """The stages whose code imports a module. tests/test_dvc_yaml.py checks that their `deps` list exactly these."""
    return {stage for stage in STAGES if module in dependencies(stage)}


def one_of_each(names: list[str], reached: Callable[[str], set[str]]) -> list[str]:
    """A name of every set of stages: to ask DVC of each takes half a second."""
    return list({frozenset(reached(name)): name for name in reversed(names)}.values())


@functools.cache
def opened(directory: Path) -> tuple[list[Any], Any]:
    """The stages of a project's dvc.yaml and dvc.lock, and DVC's lock."""
    from dvc.repo import Repo

    repo = Repo(str(directory))
    return list(repo.index.stages), repo.lock


@functools.cache
def parsed(path: str, content: bytes, fs: Any) -> Any:
    """The values of a file of parameters, of which `content` is the text."""
    from dvc.utils.serialize import load_path

    return load_path(path, fs)


def would_run(directory: Path) -> set[str]:
    """The stages that `dvc repro --dry` would name first, asked of DVC in this process: a command takes seconds."""
    from dvc.dependency import param

    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        # For each stage, DVC writes a lock of its files and parses both files of parameters: most of the time.
        patch.setattr("dvc.rwlock.rwlock", lambda *_: contextlib.nullcontext())
        patch.setattr(param, "load_path", lambda path, fs: parsed(path, Path(path).read_bytes(), fs))
        found, lock = opened(directory)
        with lock:
            return {stage.addressing for stage in found if stage.changed()}


@pytest.fixture(scope="module")
def finished(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished micro run whose files the tests of this module change and put back."""
    return Path(shutil.copytree(micro, tmp_path_factory.mktemp("repro") / "project", symlinks=True))


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Give the file `path` another content for a while. An output can be a link into DVC's cache: it is replaced."""
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink()
        path.write_bytes(before)


def after_edit(directory: Path, name: str) -> set[str]:
    """The stages that would run after a byte is appended to a file."""
    path = directory / name
    with changed(path, path.read_bytes() + b"\n"):
        return would_run(directory)


def after_param(directory: Path, leaf: str) -> set[str]:
    """The stages that would run after one value of params.yaml becomes another."""
    path = directory / "params.yaml"
    params = yaml.load(path.read_text())
    inner = functools.reduce(lambda values, key: values[key], leaf.split(".")[:-1], params)
    inner[leaf.split(".")[-1]] = other(inner[leaf.split(".")[-1]])
    before = path.read_bytes()
    with path.open("w") as file:
        YAML().dump(params, file)
    try:
        return would_run(directory)
    finally:
        path.write_bytes(before)


def test_nothing_would_run_after_a_run(finished: Path) -> None:
    assert would_run(finished) == set()


@pytest.mark.parametrize("leaf", one_of_each(LEAVES, read_by))
def test_a_parameter_reaches_the_stages_that_list_it_or_its_section(leaf: str, finished: Path) -> None:
    assert after_param(finished, leaf) == read_by(leaf)


@pytest.mark.parametrize("module", one_of_each(MODULES, imported_by))
def test_a_module_reaches_the_stages_that_import_it(module: str, finished: Path) -> None:
    assert after_edit(finished, module) == imported_by(module)


@pytest.mark.parametrize("name", FILES)
def test_a_written_file_reaches_its_readers_and_its_writer(name: str, finished: Path) -> None:
    path = finished / name
    file = path if path.is_file() else min(found for found in path.rglob("*") if found.is_file())
    inside = str(file.relative_to(finished))
    writer = {stage for stage in STAGES for kind in ("outs", "metrics", "plots") if name in written(stage, kind)}
    readers = {stage for stage in STAGES for dep in data_dependencies(stage) if Path(inside).is_relative_to(dep)}
    assert after_edit(finished, inside) == writer | readers


@pytest.mark.parametrize("extra", TRACKED)
def test_a_pin_reaches_the_stages_whose_result_it_can_change(extra: str, finished: Path) -> None:
    path = finished / "pyproject.toml"
    text = path.read_text()
    start = text.index(f"\n{extra} = [")
    old = tomllib.loads(text)["project"]["optional-dependencies"][extra][0]
    edited = text[:start] + text[start:].replace(old, f"{old}.1", 1)
    with changed(path, edited.encode()):
        assert would_run(finished) == {stage for stage in STAGES if extra in extras_listed(stage)}
    assert extra in PROJECT["optional-dependencies"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    {
        "pipeline/models/hub.py": "artificial base",
        "pipeline/models/weights.py": "",
        "pipeline/models/directory.py": "artificial base merge quantize reference",
        "pipeline/simulated/trials.py": "download",
        "pipeline/sections/report.py": "report",
        "pipeline/sections/generate.py": "format generate",
        "pipeline/run.py": "",
        "pipeline/commands/ask.py": "",
        "models/adapter/training.json": "train merge report",
        "data/formatted/system_prompt.txt": "artificial format quantize",
    }.items(),
)
def test_an_edit_reaches_no_more_than_this(edit: str, expected: str, finished: Path) -> None:
    assert after_edit(finished, edit) == set(expected.split())


# Real runs


@pytest.fixture
def copy(micro: Path, tmp_path: Path) -> Path:
    """A copy of the finished micro run."""
    return Path(shutil.copytree(micro, tmp_path / "project", symlinks=True))


@pytest.mark.slow
def test_a_parameter_of_evaluation_scores_both_models_again_and_trains_none(copy: Path) -> None:
    set_params(copy, "evaluate", max_new_tokens=4)
    ran = set(repro(copy))  # report only if an answer differs
    assert {"format", "evaluate", "baseline"} <= ran <= {"format", "evaluate", "baseline", "report"}


@pytest.mark.slow
def test_a_training_parameter_leaves_data_base_and_baselines_alone_and_comes_back_from_the_cache(copy: Path) -> None:
    set_params(copy, "train", lora_alpha=32)
    after = repro(copy)
    assert set(after) == {"train", "merge", "quantize", "evaluate", "reference", "generate", "report"}
    set_params(copy, "train", lora_alpha=16)
    assert set(repro(copy)) <= {"merge"}  # the merged weights are not cached; all else comes from the run cache


@pytest.mark.slow
def test_a_comment_reruns_its_stage_and_nothing_that_follows(copy: Path) -> None:
    path = copy / "pipeline/stages/quantize.py"
    path.write_text(path.read_text() + "# a comment\n")
    assert repro(copy) == ["quantize"]


def test_an_edit_that_changes_no_result_is_recorded_with_dvc_commit(copy: Path) -> None:
    path = copy / "pipeline/core/errors.py"
    path.write_text(path.read_text() + "# a comment\n")
    assert would_run(copy) == imported_by("pipeline/core/errors.py")
    with contextlib.chdir(copy):
        dvc_here("commit", "--force", "--quiet")
    opened.cache_clear()  # it read dvc.lock before
    assert would_run(copy) == set()


@pytest.mark.slow
def test_another_mirror_with_equal_files_downloads_again_and_nothing_follows(copy: Path, tmp_path: Path) -> None:
    from pipeline.core.files import sha256

    names = {"records": "ori_pqal.json", "test_ground_truth": "test_ground_truth.json"}
    for mirror in ("one", "two"):
        shutil.copytree(copy / "data/raw", tmp_path / mirror)
    files = {key: {"name": name, "sha256": sha256(copy / "data/raw" / name)} for key, name in names.items()}
    params = yaml.load(copy / "params.yaml")
    params["download"] = {"source": "files", "location": str(tmp_path / "one"), **files}
    with (copy / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    repro(copy)
    set_params(copy, "download", location=str(tmp_path / "two"))
    assert repro(copy) == ["download"]


@pytest.mark.slow
def test_two_directories_give_the_same_bytes_and_no_output_names_its_directory(micro: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(micro, tmp_path / "elsewhere", symlinks=True))
    shutil.rmtree(again / ".dvc/cache")
    run_command(again, "rm -rf data models metrics dvc.lock")
    assert len(repro(again)) == len(stages(again))
    for name in FILES:
        if "resources" in name or "memory" in name:
            continue
        for path in [again / name] if (again / name).is_file() else (again / name).rglob("*"):
            if path.is_file():
                body = path.read_bytes()
                assert body == (micro / path.relative_to(again)).read_bytes(), path
                assert str(again).encode() not in body, path
