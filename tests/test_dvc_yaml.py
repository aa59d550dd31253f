"""dvc.yaml says of every stage what its code reads: modules, parameters, files and packages. No stage is run."""

import ast
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, stages, yaml
from ruamel.yaml import YAML
from ruamel.yaml.tokens import AliasToken, AnchorToken

from pipeline.core.stage import Section

STAGES = stages(ROOT)
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = "project.optional-dependencies."
# A stage outside this list has no parameter of its own: all that it needs travels in files.
OWN_SECTION = {"download", "base", "format", "train", "quantize", "evaluate", "reference", "report"}

# Their __init__.py hold a docstring and nothing that could change a result.
PACKAGES = {f"pipeline.{path.parent.name}" for path in (ROOT / "pipeline").glob("*/__init__.py")}

every_stage = pytest.mark.parametrize("stage", STAGES)
every_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)


# What the code reads, from its syntax trees


def source(module: str) -> Path | None:
    """The file of a `pipeline` module or package, None if there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


def imports(module: str) -> set[str]:
    """Full names of all that a module imports, inside functions too, and of the modules that it runs by name."""
    path = source(module)
    assert path, module
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(parent), names=names, level=0):
                found |= {parent, *(f"{parent}.{alias.name}" for alias in names)}
            case ast.ImportFrom():
                pytest.fail(f"{path}: a relative import, which this walk does not follow")
            case ast.Constant(value=str(text)) if re.fullmatch(r"pipeline(\.\w+)+", text):
                found.add(text)  # `python -m pipeline.models.gguf`
            case _:
                pass
    return found


def closure(stage: str) -> set[str]:
    """Every `pipeline` module that a stage's module imports, itself included, transitively."""
    todo, seen = {f"pipeline.stages.{stage}"}, {"pipeline"}
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= {name for name in imports(module) if name.startswith("pipeline.") and source(name)} - seen - PACKAGES
    return seen


def as_dependency(module: str) -> str:
    """How dvc.yaml names a module: its file, or the directory if it lies in a package below `pipeline`."""
    if module == "pipeline.simulated" or module.startswith("pipeline.simulated."):
        return "pipeline/simulated"
    path = source(module)
    assert path
    return path.relative_to(ROOT).as_posix()


def sections_read(module: str) -> set[str]:
    """The sections of params.yaml that a module reads by name."""
    path = source(module)
    assert path
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="load") | ast.Name(id="read_section"), args=[ast.Constant(value=str(name))]
            ):
                found.add(name)
            case _:
                pass
    return found


@functools.cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def distributions(stage: str) -> set[str]:
    """The third-party distributions that a stage imports; one that is not installed here has its module's name."""
    names = {name.partition(".")[0] for module in closure(stage) for name in imports(module)}
    foreign = names - set(sys.stdlib_module_names) - {"pipeline"}
    return {canonical(installed().get(name, [name])[0]) for name in foreign}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# What dvc.yaml says


def paths(entries: list[Any]) -> dict[str, dict[str, Any]]:
    """Path -> options of a list of outs, metrics or plots."""
    return {path: options for entry in entries for path, options in (named(entry),)}


def named(entry: Any) -> tuple[str, dict[str, Any]]:
    return next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})


def written(stage: str, kind: str) -> dict[str, dict[str, Any]]:
    return paths(STAGES[stage].get(kind, []))


def sections_listed(stage: str) -> set[str]:
    return {entry for entry in STAGES[stage].get("params", []) if isinstance(entry, str)}


def extras_listed(stage: str) -> set[str]:
    names = [name for entry in STAGES[stage]["params"] if isinstance(entry, dict) for name in entry["pyproject.toml"]]
    return {name.removeprefix(EXTRAS) for name in names}


def pins(extra: str) -> dict[str, str]:
    """Distribution -> its pin in an extra."""
    return {canonical(re.split(r"[\[=]", pin)[0]): pin for pin in PYPROJECT["optional-dependencies"][extra]}


# (a) modules


@every_stage
def test_a_stage_runs_the_module_of_its_name(stage: str) -> None:
    """`exec` makes it DVC's own child under any shell: only then does it die with DVC."""
    assert STAGES[stage]["cmd"].split()[:4] == ["exec", "python3", "-m", f"pipeline.stages.{stage}"]


@every_stage
def test_deps_are_the_modules_that_a_stage_imports_all_and_only(stage: str) -> None:
    listed = {dep for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/")}
    assert listed == {as_dependency(module) for module in closure(stage)}


def test_train_imports_at_most_three_shared_modules_since_an_edit_to_one_retrains() -> None:
    assert len(closure("train") - {"pipeline", "pipeline.stages.train"}) <= 3


def test_only_stages_with_an_embedded_source_import_the_embedded_package() -> None:
    assert {stage for stage in STAGES if "pipeline/simulated" in STAGES[stage]["deps"]} == {"download", "base"}


# (b) parameters


@every_stage
def test_params_list_the_sections_that_a_stage_reads_all_and_only(stage: str) -> None:
    assert sections_listed(stage) == set().union(*map(sections_read, closure(stage)))


@every_stage
def test_a_stage_lists_its_own_section(stage: str) -> None:
    assert (stage in sections_listed(stage)) == (stage in OWN_SECTION)


@every_profile
def test_a_profile_is_whole_and_its_sections_fit_their_stages_models(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.load(profile)
    assert set(values) == OWN_SECTION
    (tmp_path / "params.yaml").write_bytes(profile.read_bytes())
    monkeypatch.chdir(tmp_path)
    for stage in values:
        module = importlib.import_module(f"pipeline.stages.{stage}")
        # A section with variants has a function that picks its model; the others have one model.
        loaded = module.load_params() if hasattr(module, "load_params") else module.Params.load(stage)
        assert isinstance(loaded, Section)


def test_no_parameter_has_a_default_in_code_which_dvc_could_not_track() -> None:
    modules = {module for stage in STAGES for module in closure(stage)}
    for module in modules:
        importlib.import_module(module)
    todo, models = [Section], set[type[Section]]()
    while todo:
        below = todo.pop().__subclasses__()
        todo += below
        models |= {model for model in below if model.__module__.startswith("pipeline.")}
    assert len(models) >= len(OWN_SECTION)
    for model in models:
        assert all(field.is_required() for field in model.model_fields.values()), model
        assert model.model_config.get("extra") == "forbid"
        assert model.model_config.get("strict")
        assert model.model_config.get("frozen")


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *PROFILES], ids=lambda path: path.stem)
def test_parameters_use_no_yaml_anchor_behind_which_dvc_exp_run_changes_nothing(path: Path) -> None:
    tokens: Any = YAML().scan(path.read_text(encoding="utf-8"))  # pyright: ignore[reportUnknownMemberType]
    assert not [token for token in tokens if isinstance(token, AnchorToken | AliasToken)]


# (c) files


@every_stage
def test_cmd_names_the_files_that_dvc_tracks_all_and_only(stage: str) -> None:
    given = STAGES[stage]["cmd"].split()[4:]
    data = [dep for dep in STAGES[stage]["deps"] if not dep.startswith("pipeline/")]
    tracked = [*data, *(path for kind in ("outs", "metrics", "plots") for path in written(stage, kind))]
    assert len(given) == len(set(given))
    assert len(tracked) == len(set(tracked))

    def under(path: str, parent: str) -> bool:
        return Path(path).is_relative_to(parent)

    assert [path for path in given if not any(under(other, path) for other in tracked)] == []
    assert [path for path in tracked if not any(under(path, other) for other in given)] == []


@every_stage
def test_main_takes_as_many_paths_as_cmd_names(stage: str) -> None:
    main = importlib.import_module(f"pipeline.stages.{stage}").main
    assert len(STAGES[stage]["cmd"].split()[4:]) == len(inspect.signature(main).parameters)


def test_a_path_is_written_by_one_stage_and_read_only_if_written() -> None:
    outs = [path for stage in STAGES for kind in ("outs", "metrics", "plots") for path in written(stage, kind)]
    assert len(outs) == len(set(outs))
    for stage in STAGES:
        for dep in STAGES[stage]["deps"]:
            assert dep.startswith("pipeline/") or any(Path(dep).is_relative_to(out) for out in outs), (stage, dep)


@every_stage
def test_no_stage_reads_times_and_memory_which_differ_in_every_run(stage: str) -> None:
    assert not [dep for dep in STAGES[stage]["deps"] if dep.endswith("_resources.json")]


# (d) packages


@every_stage
def test_extras_cover_the_packages_that_a_stage_imports(stage: str) -> None:
    tracked = {name for extra in extras_listed(stage) for name in pins(extra)}
    # Every stage's frame: they read parameters and arguments and show progress, and no result depends on them.
    frame = {canonical(re.split(r"[\[=]", pin)[0]) for pin in PYPROJECT["dependencies"]}
    # They fetch. In the stages after `base` that is what the manifest names, each file checked by sha256.
    frame.add("httpx")
    if stage not in ("download", "base"):
        frame.add("huggingface-hub")
    # llama.cpp's converter and gguf library come out of llama-cpp-python's source package.
    one_source = {"llama-cpp-scripts": "llama-cpp-python", "gguf": "llama-cpp-python"}
    assert sorted({one_source.get(name, name) for name in distributions(stage)} - frame - tracked) == []


@every_stage
def test_a_stage_lists_its_own_extra_and_only_extras_that_exist(stage: str) -> None:
    own = {stage} & PYPROJECT["optional-dependencies"].keys()
    assert own or stage == "reference"  # which runs what evaluate and quantize run
    assert own <= extras_listed(stage)
    assert extras_listed(stage) <= PYPROJECT["optional-dependencies"].keys()


@every_stage
def test_an_extra_pins_one_exact_version_of_each_package(stage: str) -> None:
    for extra in extras_listed(stage):
        assert all(re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+", pin) for pin in pins(extra).values())


def test_two_extras_never_pin_different_versions_of_a_package() -> None:
    seen: dict[str, str] = {}
    for extra in PYPROJECT["optional-dependencies"]:
        for name, pin in pins(extra).items():
            assert seen.setdefault(name, pin) == pin


# (e) what is cached, and what lives in git


def test_every_out_is_cached_but_the_merged_weights_which_git_ignores() -> None:
    uncached = {
        path for stage in STAGES for path, options in written(stage, "outs").items() if not options.get("cache", True)
    }
    assert uncached == {"models/merged"}
    assert "/models/merged" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@every_stage
def test_metrics_and_plots_live_in_git(stage: str) -> None:
    for kind in ("metrics", "plots"):
        assert all(options.get("cache") is False for options in written(stage, kind).values())


@every_stage
def test_no_output_is_kept_from_remotes_or_outlives_a_run(stage: str) -> None:
    # `push: false` makes a bare `dvc pull` fail on a fresh clone; `persist` turns the run cache off.
    for options in written(stage, "outs").values():
        assert not options.keys() - {"cache"}


@pytest.mark.parametrize("stage", ["evaluate", "reference", "baseline"])
def test_predictions_are_plots(stage: str) -> None:
    assert [path for path in written(stage, "plots") if path.startswith("metrics/predictions/")]
    assert not [path for path in [*written(stage, "outs"), *written(stage, "metrics")] if "predictions" in path]


def test_train_enters_the_run_cache() -> None:
    assert all(options.get("cache", True) for options in written("train", "outs").values())


# (h) weight


def test_no_stage_imports_torch_before_it_needs_it() -> None:
    program = """
import importlib, json, sys
heavy = {}
for stage in sys.argv[1:]:
    importlib.import_module(f"pipeline.stages.{stage}")
    heavy[stage] = sorted({"torch", "transformers", "datasets", "llama_cpp", "sklearn"} & sys.modules.keys())
json.dump(heavy, sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *STAGES], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert json.loads(done.stdout) == {stage: [] for stage in STAGES}
