"""`base` examines a model once and completely: what it refuses, and that doing what the sentence says helps.

tests/unit/test_weights.py has what a hub may answer, tests/stages/test_bases.py the converter's part.
"""

import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from huggingface_hub import close_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors.numpy import save
from tokenizers import Tokenizer

from pipeline.core.errors import Fail
from pipeline.models import weights
from pipeline.models.chat import ChatTemplate
from pipeline.models.directory import TINY_BASE
from pipeline.sections.base import Tiny
from pipeline.stages import base
from tests.conftest import output_of
from tests.hub import Server
from tests.unit import test_weights as common
from tests.unit.test_weights import CONFIGURATION, FIRST, INDEX, LAST, PLACES, SHARDS, WEIGHTS, load, run_base, write

hub = common.hub  # a fixture
SINGLE, NORM, ODD = "model.safetensors", "model.norm.weight", "model 1.safetensors"
Files = dict[str, bytes | None]  # None: not there
ALL = save(WEIGHTS)
TOKENIZER = json.loads(CONFIGURATION["tokenizer_config.json"])
WHOLE: Files = {**CONFIGURATION, SINGLE: ALL}  # as one file
SHARDED: Files = {**CONFIGURATION, **SHARDS, INDEX: common.MODEL[INDEX]}


def as_type(dtype: str) -> Files:
    import torch
    from safetensors.torch import save as save_tensors

    return {
        SINGLE: save_tensors({name: torch.tensor(value).to(getattr(torch, dtype)) for name, value in WEIGHTS.items()})
    }


def config(**changes: Any) -> Files:
    return {"config.json": json.dumps({**common.CONFIG, **changes}).encode()}


def index(places: dict[str, str]) -> Files:
    return {INDEX: json.dumps({"weight_map": places}).encode()}


def without(name: str) -> dict[str, Any]:
    return {other: value for other, value in WEIGHTS.items() if other != name}


def tokenizer_with(token: str) -> Files:
    """The tiny base's tokenizer with one token more: its id is the first beyond the embedding."""
    tokenizer = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json"))
    tokenizer.add_special_tokens([token])
    return {"tokenizer.json": tokenizer.to_str().encode()}


# kind -> what is changed in the model, and words of the refusal
OF_SHARDS: dict[str, tuple[Files, str]] = {
    "stale file": ({SINGLE: ALL}, f"has {SINGLE} beside the shards .* elsewhere"),
    "extra shard": ({"model-3.safetensors": ALL}, "has model-3.safetensors beside the shards .* elsewhere"),
    "shard missing": ({FIRST: None}, f"lacks {FIRST}, which {INDEX} names; download it again"),
    "no index": ({INDEX: None}, f"its safetensors files are: {FIRST}, {LAST}"),
    "other directory": (index(dict.fromkeys(PLACES, f"../{FIRST}")), f"names ../{FIRST}"),
    "other names": (index(dict.fromkeys(PLACES, "w.safetensors")) | {"w.safetensors": ALL}, "names w.safe"),
    "space in name": (index(dict.fromkeys(PLACES, ODD)) | {ODD: ALL}, f"names {ODD}"),
    "no weight_map": ({INDEX: b'{"weight_map": ["a"]}'}, "no weight_map"),
    "not in index": (index({name: PLACES[name] for name in without(NORM)}), f"{NORM} is not both in {INDEX}"),
}
OF_ONE_FILE: dict[str, tuple[Files, str]] = {
    "two files": ({"model_old.safetensors": ALL}, "model.safetensors, model_old.safetensors"),
    "pickles": ({SINGLE: None, "pytorch_model.bin": b"x"}, "Pickle weights are not read: convert them"),
    "tensor missing": ({SINGLE: save(without(NORM))}, f"{NORM} is missing"),
    "extra tensor": ({SINGLE: save({**WEIGHTS, "model.x": WEIGHTS[NORM]})}, "model.x is in no layer"),
    "extra layer": (config(num_hidden_layers=0), "model.layers.0.*is in no layer.* and 4 more"),
    "shape": (config(intermediate_size=8), r"gate_proj.weight is \(4, 8\), config.json says \(8, 8\)"),
    "float8": (as_type("float8_e4m3fn"), "weights of type F8_E4M3"),
    "integers": (as_type("int8"), "weights of type I8"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "has a quantization_config"),
    "pad id": (config(pad_token_id=1024), "pad_token_id is 1024, outside the vocabulary of 1024"),
    "negative id": (config(pad_token_id=-1), "pad_token_id is -1, outside the vocabulary"),
    "end ids": (config(eos_token_id=[1, 9999]), "eos_token_id is 9999"),
    "generation": ({"generation_config.json": b'{"eos_token_id": 2000}'}, "generation_config.json's eos_tok"),
    "added token": (tokenizer_with("<pad>"), "id of '<pad>' is 1024, outside"),
    "named token": (
        {"tokenizer_config.json": json.dumps({**TOKENIZER, "pad_token": {"content": "<pad>"}}).encode()},
        "pad_token '<pad>', which tokenizer.json lacks, is 1024, outside",
    ),
    "no vocab_size": (config(vocab_size=None, text_config=None), "config.json has no vocab_size"),
    "architecture": (config(model_type="new"), "transformers cannot build a causal language model"),
    "no language": (config(model_type="vit"), "transformers cannot build a causal language model"),
    "adapter": ({"adapter_config.json": b"{}"}, "holds an adapter beside a model"),
    "tokenizer": ({"tokenizer.json": b'{"added_tokens": [{}]}'}, "no fast tokenizer"),
}
REFUSED = {
    **{kind: (SHARDED, *case) for kind, case in OF_SHARDS.items()},
    **{kind: (WHOLE, *case) for kind, case in OF_ONE_FILE.items()},
}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for a local model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "check_convertible", Mock())
    return tmp_path / "model"


def use(path: Any, files: Files) -> str:
    """The refusal of `base` of a local model with these files, or ""."""
    write(Path(path), {name: body for name, body in files.items() if body is not None})
    Path("params.yaml").write_text(json.dumps({"base": {"source": "local", "path": str(path)}}))
    try:
        run_base()
    except Fail as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", REFUSED)
def test_a_local_model_that_programs_would_read_differently_is_refused(local: Path, kind: str):
    model, changes, words = REFUSED[kind]
    said = use(local, {**model, **changes})
    assert (re.search(words, said) is not None, said.count("choose another base")) == (True, 1), said
    assert not Path("base").exists()
    for name, body in changes.items():  # the remedy: what was changed is undone, and added files are moved away
        (local / name).unlink(missing_ok=True) if name not in model or body is None else None
    assert use(local, model) == ""
    assert load() == local


@pytest.mark.parametrize("kind", sorted(REFUSED.keys() - {"other directory"}))  # no file of a hub begins with ../
def test_a_repository_of_a_hub_is_refused_for_the_same(hub: Server, kind: str):
    model, changes, words = REFUSED[kind]
    hub.add_repository("o/n", {name: body for name, body in (model | changes).items() if body is not None})
    with pytest.raises(Fail, match=words):
        run_base()


def test_headers_come_by_range_requests_and_only_small_files_are_fetched(hub: Server):
    asked: list[tuple[str, str]] = []

    def client() -> httpx.Client:
        made = default_client_factory()
        note: Callable[[Any], None] = lambda sent: asked.append((sent.url.path, sent.headers.get("range", "")))  # noqa: E731
        made.event_hooks["request"].append(note)
        return made

    close_session()
    set_client_factory(client)
    try:
        run_base()
    finally:
        set_client_factory(default_client_factory)
    of_weights = {(path, part) for path, part in asked if path.endswith(".safetensors")}
    assert of_weights == {(f"{common.RESOLVE}/{name}", "bytes=0-100000") for name in SHARDS}
    fetched = {path.name for path in Path("cache").glob("models--*/snapshots/*/*")}
    assert fetched == {*CONFIGURATION, INDEX, "LICENSE"}


def test_what_no_reader_needs_is_no_fault(local: Path):
    tied = {SINGLE: save({**without("lm_head.weight"), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)})}
    assert "weights of type F64" in use(local, {**WHOLE, **tied})
    tied[SINGLE] = tied[SINGLE].replace(b'"F64","shape":[2]', b'"F32","shape":[4]')
    assert "lm_head.weight is missing" in use(local, {**WHOLE, **tied})
    assert use(local, {**WHOLE, **tied, **config(tie_word_embeddings=True)}) == ""


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~/model", "~ is not expanded; write the whole path"),
        *((path, "is not a directory; correct it") for path in ("gone", "params.yaml", "\x00", " ")),
        ("\ud800", "unable to parse"),
    ],
)
def test_a_path_that_is_no_directory_is_named(local: Path, path: str, words: str):
    Path("params.yaml").write_text(json.dumps({"base": {"source": "local", "path": path}}))
    with pytest.raises(Fail, match=f"params.yaml: base.path: .*{words}"):
        run_base()


CHANGED = {
    "altered": (LAST, SHARDS[LAST][:-1] + b"x", "does not have the sha256.* run `dvc repro -f -s base`, .* restore"),
    "longer": (LAST, SHARDS[LAST] + b"x", "bytes, expected .* run `dvc repro -f -s base`"),
    "configuration": ("config.json", CONFIGURATION["config.json"] + b"\n", "differs .* `dvc repro -f -s base`"),
    "another file": (SINGLE, ALL, "has model.safetensors beside the shards .* elsewhere"),
    "adapter": ("adapter_config.json", b"{}", "holds an adapter .* elsewhere"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_change_after_base_is_noticed_and_what_the_refusal_says_helps(local: Path, kind: str):
    name, body, words = CHANGED[kind]
    assert use(local, SHARDED) == ""
    write(local, {name: body})
    with pytest.raises(Fail, match=words):
        load()
    assert (local / LAST).is_file()  # the message must not advise removing local weights
    write(local, {name: SHARDED[name] or b""}) if name in SHARDED else (local / name).unlink()
    assert load() == local
    if kind in ("altered", "configuration"):
        write(local, {name: body})
        run_base()  # what `dvc repro -f -s base` does: tests/stages/test_bases.py runs it
        assert load() == local


def test_altered_weights_of_the_tiny_base_are_put_back_by_the_command_that_the_refusal_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    place = Path(shutil.copytree(TINY_BASE, "pipeline/simulated/tiny_base"))
    output_of(tmp_path, "git init -q && git add . && git -c user.name=x -c user.email=x@x commit -qm x")
    for module in (base, weights):
        monkeypatch.setattr(module, "TINY_BASE", place)
    manifest = base.manifest_of(Tiny(source="tiny"), place)
    assert manifest.files == base.local_files(place, "the tiny base")  # which examines them
    write(tmp_path / "base", {"manifest.json": manifest.model_dump_json().encode()})
    actions: list[Callable[[], Any]] = [lambda: base.manifest_of(Tiny(source="tiny"), place), load]
    for action in actions:
        (place / SINGLE).write_bytes((place / SINGLE).read_bytes()[:-1] + b"x")
        with pytest.raises(Fail) as failure:
            action()
        output_of(tmp_path, re.findall("`([^`]*)`", str(failure.value))[0])
        action()


def test_a_template_that_prints_the_date_gives_the_same_text_on_every_day(monkeypatch: pytest.MonkeyPatch):
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(1999, 1, 1)

    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    assert ChatTemplate(template, {}, "x").prompt([{"role": "user", "content": "x"}]) == "26 Jul 2024x</s>"
