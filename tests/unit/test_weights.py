"""models/base: from a hub or a directory to a small directory whose manifest names every weight file by its hash."""

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from pipeline.core.errors import Fail
from pipeline.models import base_weights, weights
from pipeline.models.directory import TINY_BASE, check_whole
from pipeline.models.examine import read_header
from pipeline.models.hub import TRIES, from_hub
from pipeline.models.manifest import Manifest, read_manifest
from pipeline.sections.base import Tiny
from pipeline.stages import base
from tests.hub import COMMIT, Answer, Server, serve

TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
TEMPLATE = (TINY_BASE / "chat_template.jinja").read_text()
SIZES = {"vocab_size": 1024, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, **SIZES}
CONFIG |= {"num_attention_heads": 2, "tie_word_embeddings": False}
SHAPES = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "gate": (4, 8), "up": (4, 8), "down": (8, 4)}
LAYER = {f"{'mlp' if len(name) > 1 else 'self_attn'}.{name}_proj": shape for name, shape in SHAPES.items()}
LAYER |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
WEIGHTS = {
    "model.embed_tokens.weight": np.zeros((1024, 8), np.float16),
    **{f"model.layers.0.{name}.weight": np.ones(shape, np.float16) for name, shape in LAYER.items()},
    "model.norm.weight": np.ones(8, np.float16),
    "lm_head.weight": np.ones((1024, 8), np.float16),
}
FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLACES = {name: LAST if name == "lm_head.weight" else FIRST for name in WEIGHTS}
SHARDS = {
    shard: save({name: value for name, value in WEIGHTS.items() if PLACES[name] == shard}) for shard in (FIRST, LAST)
}
INDEX = "model.safetensors.index.json"
CONFIGURATION = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": (TINY_BASE / "tokenizer.json").read_bytes(),
    "tokenizer_config.json": json.dumps(TOKENS | {"chat_template": TEMPLATE}).encode(),
}
MODEL = {
    **CONFIGURATION,
    **SHARDS,
    INDEX: json.dumps({"weight_map": PLACES}).encode(),
    "LICENSE": b"terms",
    "original/consolidated.00.safetensors": b"the same weights once more",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit('remote code')",
}
FILES = [{"name": name, "size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in SHARDS.items()]
RESOLVE, INFO, TREE = f"/o/n/resolve/{COMMIT}", f"/api/models/o/n/revision/{COMMIT}", f"/api/models/o/n/tree/{COMMIT}"
ALTERED = SHARDS[LAST][:-1] + b"x"


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(body)
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub with MODEL as o/n, an empty cache, and a params.yaml that names it in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(json.dumps({"base": {"source": "hub", "repo_id": "o/n", "revision": COMMIT}}))
    monkeypatch.setattr("pipeline.models.hub.time.sleep", lambda seconds: None)
    monkeypatch.setattr(base, "check_convertible", lambda *arguments: None)  # tests/stages has it
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        server.add_repository("o/n", MODEL)
        yield server


def run_base() -> Manifest:
    base.main(Path("base"), Path("base.json"), Path("resources.json"))
    return read_manifest(Path("base"))


def load() -> Path:
    """As the process of `base_weights` does."""
    manifest = read_manifest(Path("base"))
    directory = weights.locate(Path("base"), manifest)
    weights.verify(directory, manifest)
    return directory


def follow(failure: pytest.ExceptionInfo[Fail]) -> None:
    """Do what the sentence says."""
    (path,) = re.findall(r"remove (\S+) and run `dvc repro`", str(failure.value))
    Path(path).unlink()


class TestHub:
    def test_configuration_and_terms_come_to_base_and_weights_into_the_manifest(self, hub: Server):
        assert run_base().model_dump(exclude_defaults=True) == {
            "source": "hub",
            "repo_id": "o/n",
            "revision": COMMIT,
            "files": FILES,
        }
        small = {*CONFIGURATION, INDEX, "LICENSE"}
        assert {path.name for path in Path("base").iterdir()} == {*small, "chat_template.jinja", "manifest.json"}
        assert (Path("base") / "chat_template.jinja").read_text() == TEMPLATE
        assert {path.name for path in Path("cache").glob("models--*/snapshots/*/*")} == small  # nothing else is fetched

    def test_the_commit_is_asked_for_and_never_a_branch(self, hub: Server):
        run_base()
        load()
        assert [path for path in hub.requests if COMMIT not in path] == []

    def test_offline_a_complete_cache_gives_the_same_manifest(self, hub: Server, monkeypatch: pytest.MonkeyPatch):
        hub.add_repository("o/n", CONFIGURATION | SHARDS | {INDEX: MODEL[INDEX]})
        first = run_base()
        load()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert run_base() == first

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({FIRST: None, LAST: None, INDEX: None}, "needs one file model.safetensors"),
            ({INDEX: b"{}"}, "no weight_map"),
            ({LAST: None}, f"lacks {LAST}"),
            ({"model.safetensors": b""}, "has model.safetensors beside the shards"),
            ({LAST: save({"lm_head.weight": np.ones((8, 8), np.float16)})}, r"lm_head.weight is \(8, 8\)"),
            ({LAST: save({"other": np.ones(8, np.float16)})}, "lm_head.weight is missing"),
            ({LAST: save({"lm_head.weight": np.ones((1024, 8), np.int8)})}, "weights of type I8"),
            ({LAST: SHARDS[LAST][8:]}, "not a safetensors file"),
            ({"config.json": None}, "no config.json"),
            *(
                ({"config.json": json.dumps(CONFIG | change).encode()}, words)
                for change, words in (
                    ({"vocab_size": 1000}, "outside the vocabulary"),
                    ({"model_type": "none"}, "transformers cannot build"),
                    ({"quantization_config": {"a": 1}}, "quantization_config"),
                    ({"auto_map": {"AutoModel": "evil"}}, r"config\.json names code"),
                )
            ),
            ({"tokenizer_config.json": b"{}"}, "no chat template"),
            ({"tokenizer_config.json": b'{"auto_map": "evil"}'}, r"tokenizer_config\.json names code"),
            ({"chat_template.jinja": b"{{ messages[0].content }}"}, "leaves the assistant's answer out"),
            ({"tokenizer.json": b"{}"}, "no fast tokenizer"),
        ],
    )
    def test_a_model_that_cannot_be_used_is_refused_and_the_old_base_stays(
        self, hub: Server, changes: dict[str, bytes | None], words: str
    ):
        write(Path("base"), {"old": b"old"})
        hub.add_repository("o/n", {name: body for name, body in (MODEL | changes).items() if body is not None})
        with pytest.raises(Fail, match=words):
            run_base()
        assert [path.name for path in Path("base").iterdir()] == ["old"]

    @pytest.mark.parametrize("name", CONFIGURATION)
    def test_a_small_file_that_is_not_the_hubs_is_refused(self, hub: Server, name: str):
        whole = hub.answers[f"{RESOLVE}/{name}"][0]
        hub.answers[f"{RESOLVE}/{name}"] = [replace(whole, body=whole.body.replace(b": ", b" :", 1))]
        with pytest.raises(Fail, match=f"{name} differs from the hub's file") as failure:
            run_base()
        follow(failure)

    def test_weights_without_a_sha256_are_refused(self, hub: Server):
        info = json.loads(hub.answers[INFO][0].body)
        hub.add_json(INFO, info | {"siblings": [{**file, "lfs": None} for file in info["siblings"]]})
        with pytest.raises(Fail, match="the hub gives no sha256 of model-00001"):
            run_base()

    @pytest.mark.parametrize(
        ("paths", "answer", "words"),
        [
            ([TREE, INFO], Answer(401, headers={"X-Error-Code": "GatedRepo"}), "o/n is gated: .*HF_TOKEN"),
            ([f"{RESOLVE}/config.json"], Answer(401, headers={"X-Error-Code": "GatedRepo"}), "o/n is gated"),
            ([TREE, INFO], Answer(401, headers={"X-Error-Code": "RepoNotFound"}), r"base\.repo_id: the hub has no o/n"),
            ([TREE, INFO], Answer(404, headers={"X-Error-Code": "RevisionNotFound"}), r"HTTP 404.*base\.revision"),
            ([TREE, INFO], Answer(500, b"\xff\xfe"), "HTTP 500"),
        ],
    )
    def test_an_answer_that_stays_an_error_is_named(self, hub: Server, paths: list[str], answer: Answer, words: str):
        hub.answers |= {path: [answer] for path in paths}
        with pytest.raises(Fail, match=words):
            run_base()

    @pytest.mark.parametrize(
        "fault",
        [Answer(503, b"<html>overloaded</html>"), replace(Answer(200, SHARDS[LAST], sent=20)), Answer(reset=True)],
        ids=["503", "truncated", "reset"],
    )
    def test_a_fault_that_passes_is_tried_again(self, hub: Server, fault: Answer):
        run_base()
        whole = hub.answers[f"{RESOLVE}/{LAST}"][0]
        hub.answers[f"{RESOLVE}/{LAST}"] = [whole, replace(fault, headers=whole.headers), whole]  # the first: to HEAD
        assert (load() / LAST).read_bytes() == SHARDS[LAST]

    @pytest.mark.parametrize(
        ("name", "body", "problem"),
        [
            (LAST, ALTERED, "does not have the sha256"),
            (LAST, ALTERED + b"x", "bytes, expected"),
            ("config.json", b"{}", "differs from base/config.json"),
        ],
    )
    def test_an_altered_file_of_the_cache_is_refused_with_a_way_out(
        self, hub: Server, name: str, body: bytes, problem: str
    ):
        run_base()
        whole = load()
        (whole / name).resolve().write_bytes(body)
        with pytest.raises(Fail, match=f"{name} .*{problem}") as failure:
            load()
        follow(failure)
        assert load() == whole


RESPONSE = httpx.Response(503, request=httpx.Request("GET", "http://hub"))


@pytest.mark.parametrize(
    ("error", "tries", "words"),
    [
        (httpx.HTTPStatusError("x", request=RESPONSE.request, response=RESPONSE), TRIES, "HTTP 503"),
        (OSError("Consistency check failed: file should be of size 3"), TRIES, "OSError"),
        (httpx.ConnectError("no route"), 1, "ConnectError"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot be written into the hub's cache"),
    ],
)
def test_requests_are_tried_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch, error: Exception, tries: int, words: str
):
    request = Mock(side_effect=error)
    monkeypatch.setattr("pipeline.models.hub.time.sleep", lambda seconds: None)
    with pytest.raises(Fail, match=words):
        from_hub("base", request, "o/n", revision=COMMIT)
    assert request.call_count == tries


class TestDirectory:
    def test_the_weights_of_a_local_model_stay_where_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(base, "check_convertible", lambda *arguments: None)
        model = write(tmp_path / "model", {**MODEL, "chat_template.jinja": TEMPLATE.encode() + b"{# own #}"})
        Path("params.yaml").write_text(json.dumps({"base": {"source": "local", "path": str(model)}}))
        assert run_base().model_dump(exclude_defaults=True) == {"source": "local", "path": str(model), "files": FILES}
        assert {path.suffix for path in Path("base").iterdir()} == {".json", ".jinja", ""}
        assert (Path("base") / "chat_template.jinja").read_text().endswith("{# own #}")
        assert load() == model

    @pytest.mark.parametrize("body", [b"", b"\xff" * 8, SHARDS[LAST][:-1], SHARDS[LAST] + b"x", b"PK\x03\x04pickle"])
    def test_what_is_no_whole_safetensors_file_is_refused(self, tmp_path: Path, body: bytes):
        write(tmp_path, {"a.safetensors": body})
        with pytest.raises(Fail, match=r"a\.safetensors is missing, truncated"):
            check_whole([tmp_path / "a.safetensors"])
        with pytest.raises(Fail, match=r"a\.safetensors is missing, truncated"):
            read_header(tmp_path / "a.safetensors")


class TestProcess:
    def test_a_stage_gets_the_directory_or_the_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(Path(base.__file__).parents[2]))
        model = write(tmp_path / "model", {**SHARDS, LAST: ALTERED})
        about = {"source": "local", "path": str(model), "files": FILES}
        directory = write(tmp_path / "base", {"manifest.json": json.dumps(about).encode()})
        assert base_weights.weights_directory(directory, verify=False) == model  # sizes only
        with pytest.raises(Fail, match=f"{LAST} does not have the sha256"):
            base_weights.weights_directory(directory)

    def test_altered_weights_of_the_shipped_base_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(base, "TINY_BASE", write(tmp_path, MODEL))
        with pytest.raises(Fail, match="not as committed"):
            base.manifest_of(Tiny(source="tiny"), tmp_path)
