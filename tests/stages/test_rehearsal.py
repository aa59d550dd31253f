"""The rehearsal's random weights: Llama 3 8B's exact shape, whole safetensors files, served as the hub serves them."""

import json
from pathlib import Path

import numpy as np
import pytest
import requests

from benchmarks.first_run import report
from benchmarks.rehearsal import COMMIT, CONFIG, REPOSITORY, TINY, TOKENIZER, Shard, prepare, repository, serve, shapes
from pipeline.stages.report import REHEARSAL
from tests.conftest import ROOT, yaml
from tests.stages.helpers import call, change_json, numbers, tensors


def test_the_server_sends_whole_safetensors_files_of_llama_3_8bs_shape_as_the_hub_does(tmp_path: Path) -> None:
    assert sum(int(np.prod(shape)) for shape in shapes(CONFIG).values()) == 8_030_261_248
    for name in TOKENIZER:
        (tmp_path / name).write_text("{}")
    files = repository(CONFIG | TINY | {"vocab_size": 1000}, tmp_path, max_shard=2_000_000)
    shards = {name: file for name, file in files.items() if isinstance(file, Shard)}
    assert len(shards) > 1
    index = json.loads(b"".join(files["model.safetensors.index.json"].read()))
    with serve(REPOSITORY, COMMIT, files, tmp_path, 0) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        info = requests.get(f"{url}/api/models/{REPOSITORY}/revision/{COMMIT}", timeout=5).json()
        assert {file["rfilename"] for file in info["siblings"]} == files.keys()
        for name, shard in shards.items():
            path = f"{url}/{REPOSITORY}/resolve/{COMMIT}/{name}"
            whole = requests.get(path, timeout=5)
            assert (len(whole.content), whole.headers["ETag"]) == (shard.size, f'"{shard.sha256()}"')
            part = requests.get(path, headers={"Range": "bytes=1000-"}, timeout=5)
            assert (part.status_code, part.content) == (206, whole.content[1000:])
            (tmp_path / name).write_bytes(whole.content)
            for tensor, values in tensors(tmp_path / name).items():
                assert index["weight_map"][tensor] == name
                assert (values == 1).all() if "norm" in tensor else 0.015 < values.float().std() < 0.025
        server.shutdown()


@pytest.mark.parametrize("profile", ["llama3-8b-t4", "llama3-8b"])
def test_only_addresses_and_ids_of_the_profile_change(tmp_path: Path, profile: str) -> None:
    path = ROOT / "profiles" / f"{profile}.yaml"
    base = {"repo_id": REPOSITORY, "revision": COMMIT}
    prepare(tmp_path / "rehearsal", path, base, "http://127.0.0.1:1")
    shipped, used = yaml.load(path.read_text()), yaml.load((tmp_path / "rehearsal" / "params.yaml").read_text())
    for section, name in (("download", "location"), ("base", "repo_id"), ("base", "revision")):
        assert used[section][name] != shipped[section].pop(name)
        del used[section][name]
    assert used == shipped


def test_nothing_is_released_from_its_base(project: Path) -> None:
    assert REPOSITORY.startswith(REHEARSAL)
    path = project / "models" / "base" / "manifest.json"
    change_json(path, source="hub", repo_id=REPOSITORY, revision=COMMIT)
    assert call(project, "report") == ""
    (card,) = (project / "models" / "release").iterdir()
    assert "nothing is released" in card.read_text()
    assert numbers(project / "metrics" / "compare.json")["rehearsal"] is True


def test_the_report_of_a_first_run_has_costs_and_figures_and_no_path(micro: Path) -> None:
    text = report(micro)
    figures = numbers(micro / "metrics" / "compare.json")
    assert "| base | tiny " in text
    assert f"| train.seconds | {numbers(micro / 'metrics' / 'train_resources.json')['seconds']} |" in text
    assert f"| compare.tuned.accuracy.value | {figures['tuned']['accuracy']['value']} |" in text
    assert str(micro) not in text
