"""Bad input ends a stage with one sentence that names the place, and every output stays as it was."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import sha256
from tests.conftest import refused, run_command, set_params, stages
from tests.stages.helpers import TINY_BASE, call, change_json, snapshot, tensors, writable_copy

RECORDS, TEST, GGUF = "data/raw/ori_pqal.json", "data/formatted/test.jsonl", "models/medical-reasoner.gguf"
WEIGHTS, MERGED = str(TINY_BASE / "model.safetensors"), "models/merged/model.safetensors"
ADAPTER, IDENTITY = "models/adapter/adapter_model.safetensors", "models/adapter/trained_on.json"
Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="session")
def copied(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writable_copy(micro, tmp_path_factory.mktemp("damaged"))


@pytest.fixture
def damaged(copied: Path) -> Any:
    """A project for tests that damage the files that `assert_refused` gets; they are put back."""
    kept = {path: path.read_bytes() for path in (copied / "params.yaml", *map(copied.joinpath, DAMAGED))}
    yield copied
    for path, body in kept.items():
        path.write_bytes(body)


def assert_refused(project: Path, stage: str, capfd: pytest.CaptureFixture[str], *words: str) -> None:
    """Run the stage: it must fail as this module's first line says, with all of `words` in the sentence."""
    before = snapshot(project)
    capfd.readouterr()
    sentence = call(project, stage)
    assert sentence.startswith(f"{stage}: ")
    assert [word for word in words if word not in sentence] == [], sentence
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert not re.search(r"randomi[sz]ed|placebo|participants|patients", sentence + printed)  # words of the abstracts
    assert snapshot(project) == before
    assert not (project / ".checkpoints").exists()


@pytest.mark.parametrize(
    ("stage", "parameter", "value", "problem"),
    [
        ("format", "format.validation_questions", 40, "only 40 questions"),
        ("train", "train.lora_dropout", 1.0, "less than 1"),
        ("baseline", "quantize.quant_types", None, "required"),
        ("baseline", "evaluate.n_ctx", 16, "greater than or equal to 64"),
        ("evaluate", "evaluate.n_ctx", 64, f"{TEST}, PMID 900000040: "),
    ],
)
def test_a_wrong_parameter_is_named(
    damaged: Path, capfd: Any, stage: str, parameter: str, value: Any, problem: str
) -> None:
    section, name = parameter.split(".")
    set_params(damaged, section, **{name: value})
    assert_refused(damaged, stage, capfd, "params.yaml", parameter, problem)


def alter(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def alter_header(body: bytes) -> bytes:
    """Of a safetensors file: a quotation mark of its JSON becomes another character."""
    return body.replace(b'"', b"\xff", 1)


def cut(body: bytes) -> bytes:
    return body[: len(body) // 2]


def not_json(body: bytes) -> bytes:
    return body[:-3] + b",,\n"


def other(body: bytes) -> Damage:
    return lambda _: body


FILES = [
    (RECORDS, not_json, "format", "not valid JSON"),
    (RECORDS, other(b"[]"), "format", "must hold a JSON object"),
    ("data/raw/test_ground_truth.json", cut, "format", "not valid JSON"),
    ("data/raw/source.json", other(b"{}"), "quantize", "simulated: Field required"),
    ("data/formatted/train.jsonl", not_json, "train", "line 32"),
    ("data/formatted/validation.jsonl", not_json, "train", "line 8"),
    (TEST, cut, "evaluate", "line"),
    ("models/base/manifest.json", cut, "train", "JSON"),
    ("models/base/manifest.json", other(b"{}"), "merge", "source: Field required"),
    ("models/base/config.json", alter, "train", "differs from models/base/config.json"),
    ("models/base/tokenizer.json", cut, "format", "tokenizer"),
    ("models/base/tokenizer_config.json", other(b"[]"), "format", "must hold a JSON object"),
    ("models/base/chat_template.jinja", other(b"{% for"), "format", "is not a valid chat template"),
    ("models/merged/manifest.json", other(b"{}"), "reference", "source: Field required"),
    ("models/adapter/adapter_config.json", cut, "merge", "not valid JSON"),
    ("metrics/baseline.json", other(b"{}"), "report", "Field required"),
    (WEIGHTS, alter, "train", "does not have the sha256"),
    (WEIGHTS, alter, "merge", "does not have the sha256"),
    (WEIGHTS, alter, "baseline", "does not have the sha256"),
    (WEIGHTS, alter_header, "merge", "not a safetensors file"),
    (WEIGHTS, cut, "train", "bytes, expected"),
    (IDENTITY, lambda body: re.sub(rb'("sha256": ")..', rb"\g<1>00", body), "merge", "trained on other weights"),
    (ADAPTER, alter, "merge", "is not as `train` wrote it"),
    (MERGED, cut, "quantize", "truncated"),
    (MERGED, alter_header, "reference", "truncated"),
    (GGUF, cut, "evaluate", ""),
    (GGUF, lambda body: body.replace(b"{% for", b"{% fox", 1), "evaluate", "template"),
    (RECORDS, None, "format", "is missing"),
    (WEIGHTS, None, "merge", "is missing"),
    (ADAPTER, None, "merge", "is missing"),
    (IDENTITY, None, "merge", "is missing"),
    (MERGED, None, "quantize", "is missing"),
    (GGUF, None, "evaluate", "is missing"),
    (TEST, None, "baseline", "is missing"),
    (GGUF, cut, "generate", ""),
    (WEIGHTS, alter, "generate", "does not have the sha256"),
    ("data/answers.jsonl", not_json, "report", "answers.jsonl, line 40"),
    ("data/answers.jsonl", lambda body: body.partition(b"\n")[0] + b"\n", "report", "dvc repro -f generate"),
]
DAMAGED = sorted({path for path, *_ in FILES})


@pytest.mark.parametrize(("path", "damage", "stage", "problem"), FILES)
def test_a_damaged_or_missing_file_is_named(
    damaged: Path, capfd: Any, path: str, damage: Damage | None, stage: str, problem: str
) -> None:
    file = damaged / path
    body = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(body))
    # Errors call data by the user's own names.
    name = path if "trained on" not in problem else "models/adapter"
    assert_refused(damaged, stage, capfd, name if stage != "format" else path.removeprefix("data/raw/"), problem)


def test_an_adapter_of_other_layers_is_not_merged(damaged: Path, capfd: Any) -> None:
    from safetensors.torch import save_file

    named = {name.replace("layers.0.", "layers.7."): value for name, value in tensors(damaged / ADAPTER).items()}
    save_file(named, damaged / ADAPTER)
    change_json(damaged / IDENTITY, adapter=sha256(damaged / ADAPTER))
    assert_refused(damaged, "merge", capfd, "is not in the base")


@pytest.mark.parametrize(
    ("stage", "directory"),
    [("train", "models/base"), pytest.param("quantize", "models/merged", marks=pytest.mark.slow)],
)
def test_code_that_a_tokenizer_names_is_never_run(project: Path, stage: str, directory: str) -> None:
    """`base` refuses such a model: this was put there afterwards."""
    marker = project / "code-ran"
    evil = f"import pathlib\nfrom transformers import PreTrainedTokenizerFast\npathlib.Path({str(marker)!r}).touch()\n"
    for place in (directory, TINY_BASE):
        named = {"tokenizer_class": "HybridDNATokenizer", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
        change_json(project / place / "tokenizer_config.json", **named)
        (project / place / "evil.py").write_text(f"{evil}class Evil(PreTrainedTokenizerFast): pass\n")
    done = run_command(project, f"yes | ({stages(project)[stage]['cmd']})", HF_HOME=str(project / "hub"))
    assert not marker.exists(), done.stderr
    assert "Traceback" not in done.stderr
    if stage == "train":
        refused(done, "tokenizer_config.json names code")
