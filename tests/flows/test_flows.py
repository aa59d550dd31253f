"""The flows of a team: what each runs, and what it fetches from a real S3 API, on the micro profile.

A clone stands for a machine of its own. The object store is moto's server; its log of requests says what was fetched.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.branches import commit, git, link_environment
from tests.conftest import ROOT, output_of, repro, set_params, stages, yaml
from tests.flows.conftest import GGUF, cached, contents, copy_of

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
PULLING = ("--pull", "--allow-missing")


class Team(logging.Handler):
    """A git repository with a finished run, a bucket behind S3's API with its data, and the requests that this got."""

    def __init__(self, directory: Path, committed: Path, url: str) -> None:
        """The machine of the first run names the bucket in .dvc/config, and pushes its run there."""
        super().__init__()
        self.requests: list[str] = []
        client = boto3.client("s3", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b")
        client.create_bucket(Bucket="store")
        first = copy_of(committed, directory / "first")
        config = first / ".dvc/config"
        store = f"""['remote "store"']\n    url = s3://store/micro\n    endpointurl = {url}\n"""
        config.write_text(config.read_text().replace("remote = release", "remote = store") + store)
        output_of(first, "dvc push", **CREDENTIALS)
        commit(first, "a store for the team")
        git(directory, "clone", "--quiet", "--bare", str(first), "origin")
        self.directory, self.origin, self.paths = directory, directory / "origin", contents(first)

    def emit(self, record: logging.LogRecord) -> None:
        self.requests += re.findall(r'"([A-Z]+ \S+) HTTP', record.getMessage())

    def machine(self, directory: Path, branch: str = "main") -> Path:
        """A fresh clone, and a store that has been asked for nothing yet."""
        git(directory.parent, "clone", "--quiet", "--branch", branch, str(self.origin), str(directory))
        self.requests.clear()
        return directory

    def fetched(self) -> set[str]:
        """The paths of the objects read from the store since the clone or since this was last asked."""
        requests = " ".join(self.requests)
        self.requests.clear()
        found = re.findall(r"GET /store/micro/files/md5/(..)/(\w{30}(?:\.dir)?)", requests)
        return {self.paths[first + rest] for first, rest in found}

    def inputs(self, project: Path, *ran: str) -> set[str]:
        """What these stages read and none of them makes, and the lists of files of the directories that it is in."""
        read = [dep for stage in ran for dep in stages(project)[stage]["deps"]]
        read = [path for path in read if not under(path, cached(project, *ran))]
        files = {path for path in self.paths.values() if under(path, read)}
        lists = {path for md5, path in self.paths.items() if md5.endswith(".dir")}
        return files | {path for path in lists if any(under(file, [path]) for file in files)}


def under(path: str, parents: list[str]) -> bool:
    """Whether a path is one of others, or lies below one."""
    return any(Path(path).is_relative_to(parent) for parent in parents)


@pytest.fixture(scope="module")
def team(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    server, logger = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False), logging.getLogger("werkzeug")
    server.start()
    team = Team(tmp_path_factory.mktemp("team"), committed, "http://{}:{}".format(*server.get_host_and_port()))
    logger.setLevel(logging.INFO)
    logger.addHandler(team)
    yield team
    logger.removeHandler(team)
    server.stop()


def test_2_a_pull_leaves_nothing_to_do_and_then_other_protocols_score_again(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert team.fetched() == set(team.paths.values())
    assert (clone / GGUF).read_bytes()[:4] == b"GGUF"
    assert repro(clone, "--allow-missing") == []
    assert git(clone, "status", "--porcelain") == ""
    set_params(clone, "evaluate", protocols=["chat"])
    assert repro(clone, "--allow-missing", "evaluate") == ["evaluate"]
    assert team.requests == []


def files(project: Path) -> dict[str, Any]:
    """What the last report says of each GGUF."""
    return json.loads((project / "metrics/compare.json").read_text())["files"]


@pytest.mark.slow
def test_3_another_quantization_merges_again_and_trains_nothing(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    set_params(clone, "quantize", quant_types=["Q8_0", "IQ3_XS"])
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert sorted(repro(clone)) == ["baseline", "evaluate", "generate", "merge", "quantize", "report"]
    assert files(clone).keys() == {"Q8_0", "IQ3_XS"}


@pytest.mark.slow
@pytest.mark.parametrize("types", [["Q4_K_M", "IQ3_XS", "Q3_K_M"], ["Q4_K_M"]], ids=["added", "removed"])
def test_2_to_5_after_a_type_is_added_or_removed(team: Team, types: list[str], tmp_path: Path) -> None:
    first, branch = team.machine(tmp_path / "first"), f"types-{len(types)}"
    git(first, "switch", "--quiet", "--create", branch)
    set_params(first, "quantize", quant_types=types)
    output_of(first, "dvc pull", **CREDENTIALS)
    assert sorted(repro(first)) == ["evaluate", "merge", "quantize", "report"]
    assert files(first).keys() == set(types)
    output_of(first, "dvc push", **CREDENTIALS)
    commit(first, branch)
    git(first, "push", "--quiet", "origin", "HEAD")

    second = team.machine(tmp_path / "second", branch)
    output_of(second, "dvc pull", **CREDENTIALS)
    made = {path.name for path in (second / "models/quantized").iterdir()}
    assert made == {"SHA256SUMS", *(f"medical-reasoner-{name}.gguf" for name in types[1:])}
    assert repro(second, "--allow-missing") == []
    assert git(second, "status", "--porcelain") == ""
    set_params(second, "evaluate", protocols=["chat"])
    assert sorted(repro(second, "--allow-missing")) == ["baseline", "evaluate", "report"]
    assert files(second).keys() == set(types)

    third = team.machine(tmp_path / "third", branch)
    set_params(third, "evaluate", protocols=["chat"])
    assert sorted(repro(third, *PULLING, **CREDENTIALS)) == ["baseline", "evaluate", "report"]

    fourth = team.machine(tmp_path / "fourth", branch)
    set_params(fourth, "train", learning_rate=1e-4)
    ran = repro(fourth, *PULLING, **CREDENTIALS)
    assert sorted(ran) == ["evaluate", "generate", "merge", "quantize", "reference", "report", "train"]
    assert files(fourth).keys() == set(types)


@pytest.mark.slow
def test_one_file_among_several_is_pulled_alone(team: Team, tmp_path: Path) -> None:
    clone, path = team.machine(tmp_path / "clone"), "models/quantized/medical-reasoner-IQ3_XS.gguf"
    output_of(clone, f"dvc pull {path}", **CREDENTIALS)
    assert [one.name for one in (clone / "models").rglob("*.gguf")] == [Path(path).name]
    assert team.fetched() == {path, "models/quantized"}


@pytest.mark.slow
def test_1_a_fresh_clone_runs_all_that_git_has_no_result_of_and_asks_no_store(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    # The same machine gives the same bits, and git has the scores of those. The fixture `micro` is the run of all.
    assert set(stages(clone)) - set(repro(clone)) == {"evaluate", "reference", "baseline"}
    assert repro(clone) == []
    assert team.requests == []


@pytest.mark.slow
def test_4_and_6_another_training_parameter_makes_a_pull_request_to_compare(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    git(clone, "switch", "--quiet", "--create", "slower")
    set_params(clone, "train", learning_rate=1e-4)
    ran = repro(clone, *PULLING, **CREDENTIALS)
    assert sorted(ran) == ["evaluate", "generate", "merge", "quantize", "reference", "report", "train"]
    fetched = team.fetched()
    assert fetched == team.inputs(clone, *ran)
    assert {"data/formatted/train.jsonl", "models/base/tokenizer.json"} <= fetched
    assert not {"data/raw/ori_pqal.json", GGUF, "models/adapter"} & fetched
    commit(clone, "train with a lower learning rate")
    git(clone, "push", "--quiet", "origin", "HEAD")  # to git alone, not to the store

    review = team.machine(tmp_path / "review", "slower")

    def difference(what: str) -> Any:
        return json.loads(output_of(review, f"dvc {what} diff main --json"))

    assert difference("params")["params.yaml"].keys() == {"train.learning_rate"}
    metrics = difference("metrics")
    assert metrics["metrics/train.json"]["validation_loss"]["diff"] != 0
    assert "tuned.renormalised.brier" in metrics["metrics/compare.json"]
    output_of(review, "python3 -m pipeline plots --frame-only && dvc plots diff main")
    page = (review / "dvc_plots/index.html").read_text()
    assert page.count('"rev": "main"') == page.count('"rev": "workspace"') > 0
    assert team.requests == []


@pytest.mark.slow
def test_5_other_protocols_fetch_the_gguf_and_the_questions_and_a_pull_completes_them(
    team: Team, tmp_path: Path
) -> None:
    clone = team.machine(tmp_path / "clone")
    set_params(clone, "evaluate", protocols=["chat"])
    ran = repro(clone, *PULLING, **CREDENTIALS)
    assert sorted(ran) == ["baseline", "evaluate", "report"]
    fetched = team.fetched()
    assert fetched == team.inputs(clone, *ran)
    assert {GGUF, "data/formatted/test.jsonl"} <= fetched
    assert not {"data/raw/ori_pqal.json", "models/adapter/adapter_model.safetensors"} & fetched
    set_params(clone, "format", seed=2)  # reads data/raw, which is there in part, and DVC takes it for whole
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert sorted(set(stages(clone)) - set(repro(clone))) == ["artificial", "base", "download"]


@pytest.mark.slow
def test_5_another_context_length_is_checked_by_format_and_trains_nothing(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    set_params(clone, "evaluate", n_ctx=1024)
    output_of(clone, "dvc pull", **CREDENTIALS)  # `dvc repro --pull` would lack models/merged, which reference reads
    assert set(repro(clone)) - {"report"} == {"baseline", "evaluate", "format", "merge"}
    assert repro(clone) == []


@pytest.mark.slow
def test_a_sweep_of_seeds_becomes_mean_and_spread(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    output_of(clone, "dvc pull", **CREDENTIALS)
    for seed in (1, 2):
        output_of(clone, f"dvc exp run --temp -S train.seed={seed} train")
    (row,) = [line for line in output_of(clone, "python3 -m pipeline sweep").splitlines() if "validation_loss" in line]
    _, _, seeds, _, mean, spread, low, high = (float(word) if "." in word else word for word in row.split())
    assert seeds == "2"
    assert low <= mean <= high  # four decimals: two seeds of three steps may agree in them
    assert spread == pytest.approx((high - low) / 2**0.5, abs=1e-3)


def job(team: Team, home: Path, bucket: Path, name: str, parameters: str) -> tuple[str, dict[str, str]]:
    """A machine of infra/skypilot-sweep.yaml, set up but for packages: its script and variables."""
    task: dict[str, Any] = yaml.load(ROOT / "infra/skypilot-sweep.yaml")
    setup = [line for line in task["setup"].splitlines() if not line.startswith(("apt-get", "make"))]
    endpoint = output_of(team.directory / "first", "dvc config remote.store.endpointurl").strip()
    values = {"COMMIT": git(team.origin, "rev-parse", "main").strip(), "NAME": name, "SET": parameters}
    values |= {"HOME": str(home), "GIT_URL": str(team.origin), "REMOTE": "s3://store/micro", "SAVE_STEPS": "1"}
    values |= {"AWS_ENDPOINT_URL": endpoint, **CREDENTIALS}
    home.mkdir()
    output_of(home, "\n".join(setup), **values)
    link_environment(home / "medical-reasoner")
    return task["run"].replace("/checkpoints", str(bucket)), values


@pytest.mark.slow
def test_experiments_on_many_machines_survive_a_preemption_and_are_compared_at_home(team: Team, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    steps = "train.max_steps=30"
    script, values = job(team, tmp_path / "lost", bucket, "seed-1", f"train.seed=1 {steps}")
    lost = subprocess.Popen(["bash", "-c", script], env=os.environ | values, start_new_session=True)
    while not list(bucket.glob("seed-1/*/checkpoint-3")):
        assert lost.poll() is None
        time.sleep(0.01)
    os.killpg(lost.pid, signal.SIGKILL)
    lost.wait()
    shutil.rmtree(tmp_path / "lost")
    for number, name in enumerate(("seed-1", "seed-2"), 1):
        script, values = job(team, tmp_path / name, bucket, name, f"train.seed={number} {steps}")
        output_of(tmp_path, 'bash -c "$SCRIPT"', SCRIPT=script, **values)
        shutil.rmtree(tmp_path / name)

    home = team.machine(tmp_path / "home")
    output_of(home, "dvc exp pull origin", **CREDENTIALS)
    (row,) = [line for line in output_of(home, "python3 -m pipeline sweep").splitlines() if "validation_loss" in line]
    assert row.split()[:2] == [steps, "2"]
    output_of(home, "dvc exp apply seed-1")
    assert json.loads((home / "metrics/train_resources.json").read_text())["resumed_after_step"] > 0
    assert repro(home, "--dry", "train") == []
