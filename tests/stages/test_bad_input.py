"""Bad input ends a stage with one sentence that names the place, exit status 1, and every output as it was."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_command, run_stage, set_params, stages, yaml

HALF = 0.5
QUESTIONS = "data/raw/ori_pqal.json"


def snapshot(project: Path) -> dict[str, str]:
    """The sha256 of every file that stages read or write."""
    return {
        str(path.relative_to(project)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("data", "models", "metrics")
        for path in (project / folder).rglob("*")
        if path.is_file()
    }


def assert_refused(project: Path, stage: str, *words: str) -> None:
    """Run the stage: it must fail as this module's first line says, with all of `words` in the sentence."""
    before = snapshot(project)
    result = run_stage(project, stage)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith(f"{stage}: ")
    for word in words:
        assert word in sentence, sentence
    assert not re.search(r"randomi[sz]ed|placebo|participants|patients", result.stderr)  # words of the abstracts
    assert snapshot(project) == before


@pytest.mark.parametrize(
    ("stage", "parameter", "value", "problem"),
    [
        # a missing key
        ("download", "questions", None, "required"),
        ("base", "hidden_size", None, "required"),
        ("format", "seed", None, "required"),
        ("train", "r", None, "required"),
        ("quantize", "quant_type", None, "required"),
        ("evaluate", "n_ctx", None, "required"),
        ("reference", "enabled", None, "required"),
        ("report", "seed", None, "required"),
        # an unknown key
        ("download", "question", 40, "not permitted"),
        ("base", "layers", 2, "not permitted"),
        ("format", "split", "official", "not permitted"),
        ("train", "epochs", 3, "not permitted"),
        ("quantize", "imatrix", "x", "not permitted"),
        ("evaluate", "n_threads", 2, "not permitted"),
        ("report", "bin", 10, "not permitted"),
        # a wrong type
        ("download", "questions", "many", "integer"),
        ("base", "learning_rate", "1e-3", "number"),
        ("format", "system_prompt", 1, "string"),
        ("train", "lora_alpha", 16.5, "integer"),
        ("quantize", "quant_type", 4, "Q4_K_M"),
        ("evaluate", "max_new_tokens", True, "integer"),
        ("reference", "enabled", "no", "boolean"),
        ("report", "confidence", "high", "number"),
        # a value out of range
        ("download", "questions", 3, "greater than or equal to 20"),
        ("base", "hidden_size", 128, "multiple of 256"),
        ("format", "validation_questions", 40, "only 40 questions"),
        ("train", "lora_dropout", 1.0, "less than 1"),
        ("quantize", "quant_type", "Q4_0_4_4", "Q4_K_M"),
        ("evaluate", "n_ctx", 16, "greater than or equal to 64"),
        ("evaluate", "protocols", ["lm_eval"], "name chat"),
        ("evaluate", "protocols", ["chat", "chat"], "every protocol once"),
        ("evaluate", "protocols", ["chat", "helm"], "lm_eval"),
        ("report", "bins", 1, "greater than or equal to 2"),
        ("report", "confidence", 1.5, "less than 1"),
    ],
)
def test_parameters(project: Path, stage: str, parameter: str, value: Any, problem: str):
    set_params(project, stage, **{parameter: value})
    assert_refused(project, stage, "params.yaml", f"{stage}.{parameter}", problem)


@pytest.mark.parametrize(("section", "parameter"), [("quantize", "quant_type"), ("evaluate", "n_ctx")])
def test_baseline_reads_two_sections(project: Path, section: str, parameter: str):
    set_params(project, section, **{parameter: -1})
    assert_refused(project, "baseline", f"{section}.{parameter}")


def test_params_yaml_that_is_no_yaml(project: Path):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text + "format: [1\n")
    assert_refused(project, "format", f"params.yaml, line {len(text.splitlines()) + 2}", "not valid YAML")


@pytest.mark.parametrize(
    "value",
    ["2024-13-45", "!!int abc", "!!bool maybe", "9" * 5000, "[" * 2000, "!!python/name:os.system", "*anchor", "\t1"],
)
def test_a_value_that_yaml_itself_cannot_read(project: Path, value: str):
    path = project / "params.yaml"
    path.write_text(re.sub(r"(?m)^  validation_questions: .*", f"  validation_questions: {value}", path.read_text()))
    assert_refused(project, "format", "params.yaml")


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path("MARKER").touch()


class Evil(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize(
    ("stage", "directory"), [("train", "models/base"), ("baseline", "models/base"), ("quantize", "models/merged")]
)
def test_code_that_a_tokenizer_names_is_never_run(project: Path, stage: str, directory: str):
    """Put there behind the back of `base`, which refuses such a model."""
    path = project / directory / "tokenizer_config.json"
    named = {"tokenizer_class": "HybridDNATokenizer", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    marker = project / "code-ran"
    (path.parent / "evil.py").write_text(CODE.replace("MARKER", str(marker)))
    command = stages(project)[stage]["cmd"]
    result = run_command(project, f"yes | ({command})", HF_HOME=str(project / "hub"))
    assert not marker.exists(), result.stderr
    assert "Traceback" not in result.stderr
    if stage != "quantize":
        assert result.returncode == 1
        assert "models/base: tokenizer_config.json names code of its own" in result.stderr.splitlines()[-1]


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda body: body[: int(len(body) * share)]


def alter(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def alter_header(body: bytes) -> bytes:
    """Of a safetensors file: a quotation mark of its JSON becomes another character."""
    return body.replace(b'"', b"\xff", 1)


def empty(body: bytes) -> bytes:
    return b"{}"


def no_json(body: bytes) -> bytes:
    return body[:-3] + b",,\n"


@pytest.mark.parametrize(
    ("path", "damage", "stage", "problem"),
    [
        # malformed JSON
        (QUESTIONS, no_json, "format", "not valid JSON"),
        (QUESTIONS, cut(HALF), "format", "not valid JSON"),
        (QUESTIONS, lambda body: b"[]", "format", "not a JSON object of PMIDs"),
        ("data/raw/test_ground_truth.json", cut(HALF), "format", "not valid JSON"),
        ("models/base/tokenizer.json", cut(HALF), "format", "tokenizer"),
        ("data/formatted/train.jsonl", no_json, "train", "line 32: not valid JSON"),
        ("data/formatted/validation.jsonl", no_json, "train", "line 8: not valid JSON"),
        ("data/formatted/test.jsonl", cut(HALF), "evaluate", "not valid JSON"),
        ("data/formatted/test.jsonl", lambda body: b"[]\n", "evaluate", "line 1: not a JSON object"),
        ("models/base/manifest.json", cut(HALF), "train", "not valid JSON"),
        ("models/base/manifest.json", cut(HALF), "merge", "not valid JSON"),
        ("models/base/manifest.json", cut(HALF), "baseline", "not valid JSON"),
        ("models/adapter/adapter_config.json", cut(HALF), "merge", "not valid JSON"),
        ("models/merged/manifest.json", no_json, "quantize", "not valid JSON"),
        # JSON of another kind
        ("models/base/manifest.json", empty, "train", "source: Field required"),
        ("models/base/manifest.json", empty, "merge", "source: Field required"),
        ("models/base/manifest.json", empty, "baseline", "source: Field required"),
        ("models/base/manifest.json", empty, "report", "source: Field required"),
        ("models/merged/manifest.json", empty, "quantize", "source: Field required"),
        ("models/merged/manifest.json", empty, "reference", "source: Field required"),
        ("data/raw/source.json", empty, "quantize", "has no 'name'"),
        ("data/raw/source.json", empty, "report", "has no 'simulated'"),
        ("metrics/baseline.json", empty, "report", "has no 'tfidf_accuracy'"),
        ("metrics/format.json", empty, "report", "has no 'train'"),
        ("models/base/tokenizer.json", empty, "format", "tokenizer"),
        ("models/base/tokenizer_config.json", lambda body: b"[]", "format", "is no JSON object"),
        ("models/base/chat_template.jinja", lambda body: b"{% for", "format", "does not work"),
        ("models/base/chat_template.jinja", lambda body: b"\xff", "format", "not valid UTF-8"),
        # a wrong checksum
        ("models/adapter/adapter_model.safetensors", alter, "merge", "is not as `train` wrote it"),
        ("models/base/model.safetensors", alter_header, "train", "does not have the sha256"),
        ("models/base/model.safetensors", alter_header, "merge", "no safetensors file"),
        ("models/merged/model.safetensors", alter_header, "quantize", "no safetensors file"),
        ("models/base/model.safetensors", alter, "train", "does not have the sha256"),
        ("models/base/model.safetensors", alter, "merge", "does not have the sha256"),
        ("models/base/model.safetensors", alter, "baseline", "does not have the sha256"),
        # truncated weights
        ("models/base/model.safetensors", cut(HALF), "train", "bytes in place of"),
        ("models/base/model.safetensors", cut(HALF), "merge", "bytes in place of"),
        ("models/base/model.safetensors", cut(HALF), "baseline", "bytes in place of"),
        ("models/adapter/adapter_model.safetensors", cut(HALF), "merge", "is not as `train` wrote it"),
        ("models/merged/model.safetensors", cut(HALF), "quantize", "truncated"),
        ("models/merged/model.safetensors", cut(0), "quantize", "truncated"),
        # a truncated GGUF
        ("models/medical-reasoner.gguf", cut(0.99), "evaluate", "no whole GGUF file"),
        ("models/medical-reasoner.gguf", cut(HALF), "evaluate", "no whole GGUF file"),
        ("models/medical-reasoner.gguf", cut(0.001), "evaluate", "no whole GGUF file"),
        ("models/medical-reasoner.gguf", cut(0), "evaluate", "no whole GGUF file"),
        # an altered GGUF
        ("models/medical-reasoner.gguf", lambda body: body.replace(b"{% for", b"{% fox", 1), "evaluate", "template"),
        ("models/medical-reasoner.gguf", lambda body: body.replace(b"{% for", b"{\xff for", 1), "evaluate", "utf-8"),
    ],
)
def test_files(project: Path, path: str, damage: Callable[[bytes], bytes], stage: str, problem: str):
    file = project / path
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(project, stage, path, problem)


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        (QUESTIONS, "format"),
        ("data/formatted/train.jsonl", "train"),
        ("models/base/manifest.json", "merge"),
        ("models/base/model.safetensors", "merge"),
        ("models/adapter/adapter_model.safetensors", "merge"),
        ("models/adapter/trained_on.json", "merge"),
        ("models/merged/manifest.json", "quantize"),
        ("models/merged/model.safetensors", "quantize"),
        ("models/medical-reasoner.gguf", "evaluate"),
        ("data/formatted/test.jsonl", "baseline"),
    ],
)
def test_missing_files(project: Path, path: str, stage: str):
    (project / path).unlink()
    assert_refused(project, stage, path, "is missing")


def test_a_download_with_a_wrong_checksum(project: Path, tmp_path: Path):
    params = yaml.load((project / "params.yaml").read_text())
    files = {"records": "ori_pqal.json", "test_ground_truth": "test_ground_truth.json"}
    params["download"] = {
        "source": "files",
        "location": str(project / "mirror"),
        "pqa_artificial": None,
        **{key: {"name": name, "sha256": "0" * 64} for key, name in files.items()},
    }
    (project / "params.yaml").write_text(json.dumps(params))
    (project / "mirror").mkdir()
    (project / "mirror" / "ori_pqal.json").write_text("{}")
    assert_refused(project, "download", "ori_pqal.json", "sha256", "0" * 64)


def test_an_adapter_for_another_base(project: Path):
    path = project / "models" / "adapter" / "trained_on.json"
    files = json.loads(path.read_text())["files"]
    path.write_text(json.dumps({"files": [file | {"sha256": "0" * 64} for file in files]}))
    assert_refused(project, "merge", "models/adapter", "trained on other weights", "dvc repro train")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("r", "the adapter's shape"),
        ("missing", "lora_B.weight is missing"),
        ("foreign", "is not in the base"),
        ("embedding", "is no LoRA matrix"),
    ],
)
def test_adapter_weights_that_do_not_fit(project: Path, change: str, problem: str):
    from safetensors.numpy import load_file, save_file

    path = project / "models" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    match change:
        case "r":
            tensors[name] = tensors[name][:-1].copy()
        case "missing":
            del tensors[name]
        case "foreign":
            tensors = {key.replace("layers.0.", "layers.7."): value for key, value in tensors.items()}
        case _:
            tensors["base_model.model.lm_head.weight"] = tensors[name]
    save_file(tensors, path)
    identity = path.parent / "trained_on.json"
    known = json.loads(identity.read_text()) | {"adapter": hashlib.sha256(path.read_bytes()).hexdigest()}
    identity.write_text(json.dumps(known))
    assert_refused(project, "merge", problem)


@pytest.mark.parametrize("option", ["use_dora", "use_rslora", "modules_to_save", "rank_pattern"])
def test_an_adapter_that_is_more_than_a_sum(project: Path, option: str):
    path = project / "models" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: ["x"]}))
    assert_refused(project, "merge", "adapter_config.json", option)


def test_a_prompt_that_is_too_long(project: Path):
    set_params(project, "evaluate", n_ctx=64)
    assert_refused(project, "evaluate", "data/formatted/test.jsonl", "PMID 900000040", "evaluate.n_ctx")


def test_a_duplicate_question(project: Path):
    path = project / QUESTIONS
    records = json.loads(path.read_text())
    first, second = list(records)[:2]
    path.write_text(json.dumps(records | {second: records[first]}))
    assert_refused(project, "format", f"PMID {second}", f"PMID {first}")


def test_no_params_file(project: Path):
    (project / "params.yaml").unlink()
    assert_refused(project, "format", "params.yaml is not in this directory")
