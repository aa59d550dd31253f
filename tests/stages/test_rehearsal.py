"""The rehearsal's random weights: Llama 3 8B's exact shape, whole safetensors files, served as the hub serves them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from ruamel.yaml import YAML
from safetensors import safe_open

from benchmarks.first_run import report
from benchmarks.rehearsal import COMMIT, CONFIG, REPOSITORY, TINY, TOKENIZER, Shard, prepare, repository, serve, shapes
from pipeline.stages.report import REHEARSAL
from tests.conftest import ROOT, run_stage

VOCABULARY = {"vocab_size": 1000}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in TOKENIZER:
        (directory / name).write_text("{}")
    return directory


def test_the_shape_is_that_of_llama_3_8b(tokenizer: Path):
    assert sum(int(np.prod(shape)) for shape in shapes(CONFIG).values()) == 8_030_261_248
    files = repository(CONFIG, tokenizer)
    sizes = [file.size for file in files.values() if isinstance(file, Shard)]
    assert len(sizes) == 4
    assert max(sizes) < 5_000_100_000
    index = json.loads(b"".join(files["model.safetensors.index.json"].read()))
    assert index["metadata"]["total_size"] == 16_060_522_496
    assert index["weight_map"].keys() == shapes(CONFIG).keys()


def test_a_shard_is_a_whole_safetensors_file(tokenizer: Path, tmp_path: Path):
    files = repository(CONFIG | TINY | VOCABULARY, tokenizer, max_shard=2_000_000)
    shards = {name: file for name, file in files.items() if isinstance(file, Shard)}
    assert len(shards) > 1
    for name, shard in shards.items():
        body = b"".join(shard.read())
        assert len(body) == shard.size
        for start in (1, 100, shard.size // 2, shard.size - 1):
            assert b"".join(shard.read(start)) == body[start:]
        (tmp_path / name).write_bytes(body)
        with safe_open(tmp_path / name, "pt") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118  # no mapping
                values = tensors.get_tensor(tensor).float()
                assert (values == 1).all() if "norm" in tensor else 0.015 < values.std() < 0.025


def test_the_server_answers_as_the_hub_does(tokenizer: Path):
    files = repository(CONFIG | TINY | VOCABULARY, tokenizer)
    name, shard = next((name, file) for name, file in files.items() if isinstance(file, Shard))
    with serve(files, tokenizer, 0) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        info = requests.get(f"{url}/api/models/{REPOSITORY}/revision/{COMMIT}", timeout=5).json()
        assert {file["rfilename"] for file in info["siblings"]} == files.keys()
        path = f"{url}/{REPOSITORY}/resolve/{COMMIT}/{name}"
        part = requests.get(path, headers={"Range": "bytes=1000-"}, timeout=5)
        assert part.status_code == 206
        assert part.content == b"".join(shard.read(1000))
        assert part.headers["ETag"] == f'"{shard.sha256()}"'
        assert requests.get(f"{url}/files/tokenizer.json", timeout=5).content == b"{}"
        assert requests.get(f"{url}/nothing", timeout=5).status_code == 404
        server.shutdown()


@pytest.mark.parametrize("profile", ["llama3-8b-t4", "llama3-8b"])
def test_only_addresses_and_ids_of_the_profile_change(tmp_path: Path, profile: str):
    prepare(tmp_path / "rehearsal", ROOT / "profiles" / f"{profile}.yaml", "http://127.0.0.1:1", tmp_path)
    shipped, used = (
        YAML(typ="safe").load(path.read_text())
        for path in (ROOT / "profiles" / f"{profile}.yaml", tmp_path / "rehearsal" / "params.yaml")
    )
    assert shipped.keys() == used.keys()
    assert {
        f"{section}.{name}"
        for section in used
        for name in used[section]
        if used[section][name] != shipped[section].get(name)
    } == {"download.location", "base.repo_id", "base.revision"}


def test_nothing_is_released_from_its_base(project: Path):
    assert REPOSITORY.startswith(REHEARSAL)
    path = project / "models" / "base" / "manifest.json"
    hub = {"source": "hub", "repo_id": REPOSITORY, "revision": COMMIT}
    path.write_text(json.dumps({**json.loads(path.read_text()), **hub}))
    assert run_stage(project, "report").returncode == 0
    (card,) = (project / "models" / "release").iterdir()
    assert card.read_text() == "A rehearsal with random weights: these numbers mean nothing, and nothing is released.\n"
    assert json.loads((project / "metrics" / "compare.json").read_text())["rehearsal"] is True


def test_without_a_tokenizer():
    command = [sys.executable, "-m", "benchmarks.rehearsal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("rehearsal: --tokenizer must name a directory")
    assert len(done.stderr.splitlines()) == 1


def test_the_report_of_a_first_run(tmp_path: Path):
    (tmp_path / "params.yaml").write_text((ROOT / "profiles" / "llama3-8b-t4.yaml").read_text())
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "train_resources.json").write_text('{"peak_vram_reserved_mib": 5402.0}')
    (tmp_path / "metrics" / "compare.json").write_text('{"tuned_accuracy": 0.5}')
    text = report(tmp_path)
    assert "| base | meta-llama/Meta-Llama-3-8B-Instruct 5f0b02c7" in text
    assert "| train.peak_vram_reserved_mib | 5402.0 |" in text
    assert "| compare.tuned_accuracy | 0.5 |" in text
    assert str(tmp_path) not in text
