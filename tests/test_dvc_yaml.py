"""dvc.yaml against the code: what a stage reads and DVC does not know of would leave stale results behind."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.tokens import AliasToken, AnchorToken

from pipeline.core.params import Section, load_params
from pipeline.sections.base import BASE
from pipeline.sections.download import DOWNLOAD
from pipeline.sections.pretrain import PRETRAIN
from tests.conftest import ROOT, yaml
from tools.dependencies import CODE, closure, dependencies, imports, source

DESCRIBED: dict[str, Any] = yaml.load(ROOT / "dvc.yaml")
STAGES: dict[str, dict[str, Any]] = DESCRIBED["stages"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
SECTIONS = {path.stem for path in (ROOT / "pipeline/sections").glob("[a-z]*.py")}
UNIONS = {"base": BASE, "download": DOWNLOAD, "pretrain": PRETRAIN}  # sections whose model depends on `source`
EXTRAS = "project.optional-dependencies."

every_stage = pytest.mark.parametrize("stage", STAGES)


def written(stage: str, kind: str) -> dict[str, dict[str, Any]]:
    """Path -> options of a stage's outs, metrics or plots."""
    entries = STAGES[stage].get(kind, [])
    return dict(next(iter(entry.items())) if isinstance(entry, dict) else (entry, {}) for entry in entries)


def data_dependencies(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage].get("deps", []) if not dep.startswith(CODE)]


def sections_listed(stage: str) -> set[str]:
    """Without the place in a list, such as `.0`."""
    return {entry.removesuffix(".0") for entry in STAGES[stage].get("params", []) if isinstance(entry, str)}


def extras_listed(stage: str) -> set[str]:
    entries = [entry for entry in STAGES[stage]["params"] if isinstance(entry, dict)]
    return {name.removeprefix(EXTRAS) for entry in entries for name in entry["pyproject.toml"]}


def sections_read(stage: str) -> set[str]:
    """The sections that the stage's code loads by name, or `section.name` where it takes one value of it."""
    whole, values = list[str](), list[str]()
    for path in filter(None, map(source, closure(f"pipeline.stages.{stage}"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(
                    value=ast.Call(func=ast.Name(id="load_params"), args=[ast.Constant(value=str(name)), *_]), attr=attr
                ):
                    values.append(f"{name}.{attr}")
                case ast.Call(func=ast.Name(id="load_params"), args=[ast.Constant(value=str(name)), *_]):
                    whole.append(name)
                case _:
                    pass
    taken = [value.partition(".")[0] for value in values]
    return {*values, *(name for name in whole if whole.count(name) > taken.count(name))}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(extra: str) -> dict[str, str]:
    """Distribution -> its pin."""
    return {canonical(re.split(r"[\[=]", pin)[0]): pin for pin in PROJECT["optional-dependencies"][extra]}


installed = cache(packages_distributions)  # reads a file of every package


def distribution(module: str) -> str:
    """The distribution that has a module; the module's own name if it is not installed here."""
    return canonical(installed().get(module, [module])[0])


# Modules


@every_stage
def test_a_stage_is_started_by_the_launcher_and_replaces_dvcs_shell(stage: str) -> None:
    assert STAGES[stage]["cmd"].split()[:5] == ["exec", "python3", "-m", "pipeline.run", stage]


@every_stage
def test_deps_are_the_modules_that_a_stage_imports_all_and_only(stage: str) -> None:
    listed = {dep for dep in STAGES[stage]["deps"] if dep.startswith(CODE)}
    assert listed == set(dependencies(stage))


def test_the_stage_base_depends_on_the_shipped_weights() -> None:
    assert "pipeline/simulated/tiny_base" in STAGES["base"]["deps"]


def test_the_shared_code_that_train_reaches_is_under_400_lines_since_an_edit_of_it_retrains() -> None:
    others = [closure(f"pipeline.stages.{stage}") for stage in STAGES if stage not in ("pretrain", "train")]
    shared = (closure("pipeline.stages.train") - {"pipeline.sections.train", "pipeline.sections.pretrain"}) & set[
        str
    ]().union(*others)
    assert len(shared) >= 10
    paths = filter(None, map(source, shared))
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) < 400


def test_a_packages_init_has_a_docstring_only_so_no_stage_depends_on_it() -> None:
    for path in (ROOT / "pipeline").rglob("__init__.py"):
        (statement,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(statement, ast.Expr), path


def test_the_launcher_imports_only_the_standard_library_before_the_stage() -> None:
    tree = ast.parse((ROOT / "pipeline/run.py").read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_pretrain_lists_nothing_of_train_but_code_so_that_a_change_of_train_never_reruns_it() -> None:
    assert "train" not in sections_listed("pretrain")
    assert not {"models/adapter", "data/formatted/train.jsonl"} & set(STAGES["pretrain"]["deps"])
    assert "pipeline/stages/train.py" not in STAGES["pretrain"]["deps"]
    assert "models/pretrained" in STAGES["train"]["deps"]


def test_one_profile_has_a_first_phase() -> None:
    with_phase = [path.stem for path in PROFILES if yaml.load(path)["pretrain"]["source"] != "none"]
    assert with_phase == ["llama3-8b-pqa-a"]


def test_no_stage_imports_a_heavy_package_before_it_needs_it() -> None:
    program = """
import importlib, json, sys
for stage in sys.argv[1:]:
    importlib.import_module(f"pipeline.stages.{stage}")
heavy = {"torch", "transformers", "datasets", "llama_cpp", "sklearn", "vl_convert"}
json.dump(sorted(heavy & sys.modules.keys()), sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *STAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


# Parameters


@every_stage
def test_params_list_the_sections_that_a_stage_reads_all_and_only(stage: str) -> None:
    assert sections_listed(stage) == sections_read(stage)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_has_every_section_and_each_fits_its_model(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {name.partition(".")[0] for stage in STAGES for name in sections_listed(stage)}
    assert set(yaml.load(profile)) == read
    (tmp_path / "params.yaml").write_bytes(profile.read_bytes())
    monkeypatch.chdir(tmp_path)
    for section in read:
        models = [UNIONS[section]] if section in UNIONS else section_models()[section]
        assert load_params(section, models[0])


def section_models() -> dict[str, list[Any]]:
    """Section -> the model of its name."""
    for name in SECTIONS:
        importlib.import_module(f"pipeline.sections.{name}")
    return {model.__name__.lower(): [model] for model in Section.__subclasses__()}


def test_no_parameter_has_a_default_in_code_which_dvc_could_not_track() -> None:
    models = [model for found in section_models().values() for model in found]
    assert len(models) >= len(SECTIONS)
    for model in models:
        assert all(field.is_required() for field in model.model_fields.values()), model
        assert {model.model_config.get(name) for name in ("strict", "frozen")} == {True}
        assert model.model_config.get("extra") == "forbid"


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_uses_no_yaml_anchor_behind_which_dvc_exp_run_changes_nothing(path: Path) -> None:
    tokens: Any = YAML().scan(path.read_text(encoding="utf-8"))
    assert not [token for token in tokens if isinstance(token, AnchorToken | AliasToken)]


# Files


@every_stage
def test_cmd_names_the_files_that_dvc_tracks_all_and_only(stage: str) -> None:
    given = STAGES[stage]["cmd"].split()[5:]
    tracked = [
        *data_dependencies(stage),
        *(path for kind in ("outs", "metrics", "plots") for path in written(stage, kind)),
    ]
    assert len(given) == len(set(given))
    assert len(tracked) == len(set(tracked))
    assert [path for path in given if not any(Path(other).is_relative_to(path) for other in tracked)] == []
    assert [path for path in tracked if not any(Path(path).is_relative_to(other) for other in given)] == []


@every_stage
def test_main_takes_the_paths_that_cmd_names(stage: str) -> None:
    main = importlib.import_module(f"pipeline.stages.{stage}").main
    assert len(STAGES[stage]["cmd"].split()[5:]) == len(inspect.signature(main).parameters)


def test_a_path_is_written_by_one_stage_and_read_as_a_whole_output_or_a_file_of_one() -> None:
    outs = [path for stage in STAGES for kind in ("outs", "metrics", "plots") for path in written(stage, kind)]
    assert len(outs) == len(set(outs))
    for stage in STAGES:
        for dep in data_dependencies(stage):
            assert any(Path(dep).is_relative_to(out) for out in outs), (stage, dep)


@every_stage
def test_no_stage_reads_times_and_memory_which_differ_in_every_run(stage: str) -> None:
    assert not [dep for dep in data_dependencies(stage) if "resources" in dep or "memory" in dep]


# Packages


@every_stage
def test_extras_cover_the_packages_that_a_stage_imports(stage: str) -> None:
    paths = filter(None, map(source, closure(f"pipeline.stages.{stage}")))
    names = {name.partition(".")[0] for path in paths for name in imports(path)}
    found = {distribution(name) for name in names - sys.stdlib_module_names - {"pipeline"}}
    tracked = {name for extra in extras_listed(stage) for name in pins(extra)}
    # Of every stage: they read parameters and show progress, and no result depends on them.
    frame = {canonical(re.split(r"[\[=]", pin)[0]) for pin in PROJECT["dependencies"]} | {"httpx", "typing-extensions"}
    # llama.cpp's converter and gguf library come from llama-cpp-python's source package.
    one_source = {"llama-cpp-scripts": "llama-cpp-python", "gguf": "llama-cpp-python"}
    assert sorted({one_source.get(name, name) for name in found} - frame - tracked) == []


@every_stage
def test_a_stage_lists_extras_that_exist(stage: str) -> None:
    assert extras_listed(stage) <= PROJECT["optional-dependencies"].keys()
    # Three run what others run: evaluate and quantize, or train.
    assert stage in extras_listed(stage) or stage in ("reference", "generate", "pretrain")


def test_an_extra_pins_one_exact_version_and_two_extras_never_differ() -> None:
    seen: dict[str, str] = {}
    for extra in PROJECT["optional-dependencies"]:
        for name, pin in pins(extra).items():
            assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+", pin), pin
            assert seen.setdefault(name, pin) == pin


# What is cached, and what is in git


def test_every_out_is_cached_but_the_merged_weights_which_git_ignores() -> None:
    options = {path: options for stage in STAGES for path, options in written(stage, "outs").items()}
    assert {path for path, found in options.items() if not found.get("cache", True)} == {"models/merged"}
    assert "/models/merged" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@every_stage
def test_metrics_and_plots_are_in_git(stage: str) -> None:
    for kind in ("metrics", "plots"):
        assert all(options.get("cache") is False for options in written(stage, kind).values())


@every_stage
def test_no_output_is_kept_from_remotes_or_outlives_a_run(stage: str) -> None:
    # `push: false` makes a bare `dvc pull` fail on a fresh clone; `persist` turns the run cache off.
    assert all(not options.keys() - {"cache"} for options in written(stage, "outs").values())


def test_train_enters_the_run_cache() -> None:
    assert all(options.get("cache", True) for options in written("train", "outs").values())
