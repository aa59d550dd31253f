"""The content hash: a change runs exactly the stages that it can affect again, and nothing else.

`dvc repro --dry` lists the stages whose own inputs changed; it leaves every output as it is, so no stage that follows
is listed. The tables below therefore name the stages that a change reaches directly; whether a following stage runs
depends on whether an output really changed, and the real runs at the end show that.
"""

import contextlib
import functools
import hashlib
import shutil
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, repro, run_command, stages, stages_named, yaml
from ruamel.yaml import YAML

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
ALL = ("download", "base", "format", "train", "merge", "quantize", "evaluate", "reference", "baseline", "report")

# Every leaf of params.yaml, in every profile -> the stages that read it.
PARAMETERS: dict[tuple[str, ...], str] = {
    ("download",): """
        download.source download.seed download.questions download.test_questions download.location
        download.records.name download.records.sha256
        download.test_ground_truth.name download.test_ground_truth.sha256
        download.pqa_artificial download.pqa_artificial.repo_id download.pqa_artificial.revision
        download.pqa_artificial.file.name download.pqa_artificial.file.sha256
        download.pqa_artificial.questions download.pqa_artificial.seed""",
    ("base",): """
        base.source base.repo_id base.revision base.path
        base.seed base.vocab_size base.hidden_size base.intermediate_size base.num_hidden_layers
        base.num_attention_heads base.num_key_value_heads base.conversations base.max_steps
        base.per_device_train_batch_size base.learning_rate base.embedding_learning_rate""",
    ("format",): "format.system_prompt format.validation_questions format.seed",
    ("train", "report"): """
        train.backend train.seed train.r train.lora_alpha train.lora_dropout train.target_modules
        train.bnb_4bit_quant_type train.bnb_4bit_use_double_quant train.dtype train.max_length train.max_steps
        train.per_device_train_batch_size train.gradient_accumulation_steps train.gradient_checkpointing
        train.learning_rate train.lr_scheduler_type train.warmup_steps train.weight_decay train.max_grad_norm
        train.optim train.offload_embedding train.save_steps""",
    ("quantize", "baseline"): "quantize.quant_type",
    ("evaluate", "baseline"): "evaluate.protocols evaluate.n_ctx evaluate.max_new_tokens",
    ("reference",): "reference.enabled reference.protocols reference.n_ctx reference.max_new_tokens",
    ("report",): "report.bootstrap_samples report.seed report.confidence report.bins",
}
STAGES_OF_LEAF = {leaf: stages for stages, names in PARAMETERS.items() for leaf in names.split()}

# Every module below pipeline/ -> the stages that run its code; None: no stage does, people do.
MODULES: dict[str, tuple[str, ...]] = {
    "__init__.py": ALL,
    "core/stage.py": ALL,
    "core/records.py": ALL,
    **{f"stages/{stage}.py": (stage,) for stage in ALL},
    "stages/quantize.py": ("quantize", "baseline"),
    "commands/ask.py": (),
    "reporting/compare.py": ("report",),
    "simulated/__init__.py": ("download", "base"),
    **{f"{package}/__init__.py": () for package in "stages core models scoring reporting commands".split()},
    "simulated/tiny.py": ("download", "base"),
    "simulated/tokenizer.py": ("download", "base"),
    "simulated/trials.py": ("download", "base"),
    "commands/comment.py": (),
    "commands/experiments.py": (),
    "commands/gate.py": (),
    "models/gguf.py": ("quantize", "reference", "baseline"),
    "models/gguf_header.py": ("quantize", "evaluate", "reference", "baseline", "report"),
    "commands/lock.py": (),
    "scoring/measures.py": ("evaluate", "reference", "baseline", "report"),
    "reporting/pictures.py": ("report",),
    "scoring/predict.py": ("evaluate", "reference", "baseline"),
    "commands/plots.py": (),
    "scoring/protocols.py": ("format", "evaluate", "reference", "baseline", "report"),
    "reporting/release.py": ("report",),
    "commands/release_run.py": (),
    "scoring/scorer.py": ("evaluate", "reference", "baseline"),
    "commands/summary.py": (),
    "models/weights.py": ("download", "base", "train", "merge", "quantize", "reference", "baseline", "report"),
}

# Every file that a stage writes -> the stages that a change of it reaches: those that read it, and the one that wrote
# it, since the file is no longer what that stage made. A file that is read by none is there for people.
DATA: dict[str, tuple[str, ...]] = {
    "data/raw/ori_pqal.json": ("download", "format"),
    "data/raw/test_ground_truth.json": ("download", "format"),
    "data/raw/source.json": ("download", "format", "quantize", "report"),
    "data/formatted/train.jsonl": ("format", "train", "baseline"),
    "data/formatted/validation.jsonl": ("format", "train", "quantize", "baseline"),
    "data/formatted/test.jsonl": ("format", "evaluate", "reference", "baseline"),
    "models/base/chat_template.jinja": ("base", "format", "train", "merge", "baseline", "report"),
    "models/base/config.json": ("base", "train", "merge", "baseline", "report"),
    "models/base/generation_config.json": ("base", "train", "merge", "baseline", "report"),
    "models/base/manifest.json": ("base", "train", "merge", "baseline", "report"),
    "models/base/model.safetensors": ("base", "train", "merge", "baseline", "report"),
    "models/base/tokenizer.json": ("base", "format", "train", "merge", "baseline", "report"),
    "models/base/tokenizer_config.json": ("base", "format", "train", "merge", "baseline", "report"),
    "models/adapter/*": ("train", "merge"),
    "models/merged/*": ("merge", "quantize", "reference"),
    "models/medical-reasoner.gguf": ("quantize", "evaluate", "report"),
    "models/release/*": ("report",),
    "metrics/base.json": ("base",),
    "metrics/base_resources.json": ("base",),
    "metrics/format.json": ("format", "report"),
    "metrics/label_balance.csv": ("format",),
    "metrics/token_lengths.csv": ("format",),
    "metrics/train.json": ("train",),
    "metrics/train_resources.json": ("train",),
    "metrics/train_log.csv": ("train", "report"),
    "metrics/train_memory.csv": ("train",),
    "metrics/merge_resources.json": ("merge",),
    "metrics/quantize_resources.json": ("quantize",),
    "metrics/evaluate.json": ("evaluate",),
    "metrics/evaluate_resources.json": ("evaluate",),
    "metrics/predictions/tuned.csv": ("evaluate", "report"),
    "metrics/predictions/merged.csv": ("reference", "report"),
    "metrics/reference_resources.json": ("reference",),
    "metrics/baseline.json": ("baseline", "report"),
    "metrics/baseline_resources.json": ("baseline",),
    "metrics/predictions/base.csv": ("baseline", "report"),
    "metrics/compare.json": ("report",),
    "metrics/pictures/*": ("report",),
    "metrics/reliability.csv": ("report",),
    "metrics/risk_coverage.csv": ("report",),
}

# Every extra of pyproject.toml -> the stages that a moved pin reaches; the versions of the rest change no result.
EXTRAS: dict[str, tuple[str, ...]] = {
    **{stage: (stage,) for stage in ALL if stage != "reference"},
    "quantize": ("quantize", "evaluate", "reference", "baseline", "report"),
    "evaluate": ("evaluate", "reference", "baseline", "report"),
    "s3": (),
    "server": (),
    "unsloth": ("train",),
    "test": (),
    "dev": (),
    "build": (),
}


# Running DVC, and editing the project


def would_run(directory: Path) -> list[str]:
    """What `dvc repro --dry` lists, asked of DVC's stages in this process (the command takes seconds each time)."""
    with contextlib.chdir(directory):
        stages, lock = opened(directory)
        with lock:
            return sorted(stage.addressing for stage in stages if stage.changed())


@functools.cache
def opened(directory: Path) -> tuple[list[Any], Any]:
    """The stages of a project's dvc.yaml and dvc.lock, which no test changes after it has asked, and DVC's lock."""
    from dvc.repo import Repo

    repo = Repo()
    return list(repo.index.stages), repo.lock


def leaves(values: Any, path: str = "") -> Iterator[str]:
    """The dotted path of every value in nested mappings; a list is one value."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}".strip("."))
    else:
        yield path


def other(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case str():
            return f"{value} "
        case list():
            return value[:-1]
        case _:
            return 0


def change_leaf(directory: Path, leaf: str, value: Any = None) -> None:
    """Write another value for one leaf of params.yaml, and nothing else."""
    path = directory / "params.yaml"
    params = yaml.load(path)
    *sections, name = leaf.split(".")
    inner = params
    for section in sections:
        inner = inner[section]
    inner[name] = other(inner[name]) if value is None else value
    YAML().dump(params, path)


def replace(path: Path, content: bytes) -> None:
    """Put a new file at `path`: an output may be a link into DVC's cache, which must stay as it is."""
    path.unlink()
    path.write_bytes(content)


def change_file(directory: Path, name: str) -> None:
    """Append a byte to a file (to the first one, for a pattern)."""
    path = min(directory.glob(name))
    replace(path, path.read_bytes() + b"\n")


def comment(directory: Path, module: str) -> None:
    """Append a comment to a module."""
    path = directory / "pipeline" / module
    replace(path, path.read_bytes() + b"# a comment\n")


def move_pin(directory: Path, extra: str) -> None:
    """Change the version of the first package of an extra."""
    path = directory / "pyproject.toml"
    text = path.read_text()
    start = text.index(f"\n{extra} = [")
    old = tomllib.loads(text)["project"]["optional-dependencies"][extra][0]
    path.write_text(text[:start] + text[start:].replace(old, f"{old}.1", 1))


@pytest.fixture
def changed(reproduced: Path) -> Iterator[Callable[..., list[str]]]:
    """A function that makes a change and returns the stages that would run again; the change is undone in the end."""
    kept: dict[Path, bytes] = {}

    def change(edit: Callable[[Path], None], *touched: Path) -> list[str]:
        for path in touched:
            kept[path] = path.read_bytes()
        edit(reproduced)
        return would_run(reproduced)

    yield change
    for path, content in kept.items():
        replace(path, content)


# The tables are complete


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_leaf_of_a_profile_is_in_the_table(profile: Path) -> None:
    assert sorted(set(leaves(yaml.load(profile))) - STAGES_OF_LEAF.keys()) == []


def test_every_module_is_in_the_table() -> None:
    files = {path.relative_to(ROOT / "pipeline").as_posix() for path in (ROOT / "pipeline").rglob("*.py")}
    assert sorted(files - MODULES.keys()) == []


def test_every_file_that_a_stage_writes_is_in_the_table(reproduced: Path) -> None:
    files = {path for name in ("data", "models", "metrics") for path in (reproduced / name).rglob("*")}
    listed = {path for name in DATA for path in reproduced.glob(name)}
    assert sorted({path for path in files if path.is_file() and path.name != ".gitignore"} - listed) == []


def test_every_extra_is_in_the_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(project["optional-dependencies"].keys() - EXTRAS.keys()) == []


def test_every_stage_is_in_the_tables() -> None:
    assert tuple(stages(ROOT)) == ALL


# The rows hold


def test_nothing_would_run_after_a_run(reproduced: Path) -> None:
    assert would_run(reproduced) == []


@pytest.mark.parametrize("leaf", list(leaves(yaml.load(ROOT / "profiles" / "micro.yaml"))))
def test_a_parameter_reaches_the_stages_that_read_it(leaf: str, reproduced: Path, changed: Callable[..., Any]) -> None:
    again = changed(partial(change_leaf, leaf=leaf), reproduced / "params.yaml")
    assert again == sorted(STAGES_OF_LEAF[leaf])


@pytest.mark.parametrize("module", [name for name in MODULES if (ROOT / "pipeline" / name).exists()])
def test_a_module_reaches_the_stages_that_run_it(module: str, reproduced: Path, changed: Callable[..., Any]) -> None:
    again = changed(partial(comment, module=module), reproduced / "pipeline" / module)
    assert again == sorted(MODULES[module])


@pytest.mark.parametrize("name", DATA)
def test_a_file_reaches_the_stages_that_read_it(name: str, reproduced: Path, changed: Callable[..., Any]) -> None:
    again = changed(partial(change_file, name=name), min(reproduced.glob(name)))
    assert again == sorted(DATA[name])


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_pin_reaches_the_stages_whose_result_it_can_change(
    extra: str, reproduced: Path, changed: Callable[..., Any]
) -> None:
    again = changed(partial(move_pin, extra=extra), reproduced / "pyproject.toml")
    assert again == sorted(EXTRAS[extra])


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "parameter": (partial(change_leaf, leaf="evaluate.n_ctx"), "params.yaml"),
    "module": (partial(comment, module="models/weights.py"), "pipeline/models/weights.py"),
    "file": (partial(change_file, name="models/base/tokenizer.json"), "models/base/tokenizer.json"),
    "pin": (partial(move_pin, extra="quantize"), "pyproject.toml"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_the_command_lists_what_its_stages_say(kind: str, reproduced: Path, changed: Callable[..., Any]) -> None:
    edit, touched = EDITS[kind]
    again = changed(edit, reproduced / touched)
    assert sorted(repro(reproduced, "--dry")) == again


# Real runs: what follows runs only if what it reads became another


@pytest.fixture
def copy(reproduced: Path, tmp_path: Path) -> Path:
    """A copy of the finished project to run stages in, which leaves the finished one as it is."""
    return Path(shutil.copytree(reproduced, tmp_path / "copy", symlinks=True))


def test_a_second_repro_runs_nothing_and_no_process_of_it_imports_torch(reproduced: Path, tmp_path: Path) -> None:
    trap, caught = tmp_path / "torch.py", tmp_path / "caught"
    trap.write_text(f"from pathlib import Path\nPath({str(caught)!r}).touch()\nraise ImportError('a trap')\n")
    done = run_command(reproduced, "python3 -m dvc repro", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert stages_named(done.stdout) == []
    assert not caught.exists()
    run_command(reproduced, "python3 -c 'import torch'", PYTHONPATH=str(tmp_path))
    assert caught.exists()  # the trap works


def test_a_question_of_evaluation_scores_both_models_again_and_trains_none(copy: Path) -> None:
    change_leaf(copy, "evaluate.max_new_tokens")
    again = repro(copy)
    assert {"evaluate", "baseline"} <= set(again) <= {"evaluate", "baseline", "report"}


def test_a_comment_reruns_its_stage_and_nothing_that_follows(copy: Path) -> None:
    comment(copy, "format.py")
    assert repro(copy) == ["format"]


def test_a_training_parameter_leaves_data_base_and_baselines_alone(copy: Path) -> None:
    change_leaf(copy, "train.learning_rate", 0.01)
    assert repro(copy, "train", "baseline") == ["train"]
    assert would_run(copy) == ["merge", "report"]


def test_a_parameter_that_is_put_back_takes_its_results_from_the_cache(copy: Path) -> None:
    before = yaml.load(copy / "params.yaml")["format"]["seed"]
    change_leaf(copy, "format.seed", before + 1)
    assert repro(copy, "format") == ["format"]
    change_leaf(copy, "format.seed", before)
    assert repro(copy) == []


def test_another_mirror_with_equal_files_downloads_again_and_nothing_follows(copy: Path) -> None:
    files = {name: f"{name}.json" for name in ("records", "test_ground_truth")}
    for mirror, folder in (("one", "data/raw"), ("two", "data/raw")):
        (copy / mirror).mkdir()
        shutil.copyfile(copy / folder / "ori_pqal.json", copy / mirror / files["records"])
        shutil.copyfile(copy / folder / "test_ground_truth.json", copy / mirror / files["test_ground_truth"])
    params = yaml.load(copy / "params.yaml")
    params["download"] = {
        "source": "files",
        "location": "one",
        "pqa_artificial": None,
        **{
            key: {"name": name, "sha256": hashlib.sha256((copy / "one" / name).read_bytes()).hexdigest()}
            for key, name in files.items()
        },
    }
    YAML().dump(params, copy / "params.yaml")
    assert repro(copy, "format") == ["download", "format"]  # data/raw/source.json says where the data come from
    change_leaf(copy, "download.location", "two")
    assert repro(copy, "format") == ["download"]


# Same seed, same machine: same bits


@pytest.mark.parametrize(
    "name",
    [
        "data/raw/ori_pqal.json",
        "data/formatted/train.jsonl",
        "models/base/tokenizer.json",
        "models/base/model.safetensors",
        "models/adapter/adapter_model.safetensors",
        "models/adapter/adapter_config.json",
        "models/merged/model.safetensors",
        "models/medical-reasoner.gguf",
        "metrics/predictions/tuned.csv",
        "metrics/predictions/base.csv",
        "metrics/compare.json",
    ],
)
def test_two_directories_hold_the_same_bits(name: str, reproduced: Path, micro: Path) -> None:
    one, two = ((directory / name).read_bytes() for directory in (reproduced, micro))
    assert reproduced.parent.name != micro.parent.name
    assert reproduced.name != micro.name
    assert hashlib.sha256(one).hexdigest() == hashlib.sha256(two).hexdigest()


@pytest.mark.parametrize("name", ["models/adapter", "models/medical-reasoner.gguf", "models/release"])
def test_no_output_names_the_directory_that_it_was_made_in(name: str, reproduced: Path) -> None:
    path = reproduced / name
    for file in [path] if path.is_file() else path.rglob("*"):
        assert str(reproduced).encode() not in file.read_bytes(), file
