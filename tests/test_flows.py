"""The six flows of a team: what each runs, and what it fetches from a real S3 API, on the micro profile.

Every test's clone stands for a machine of its own: it has what git has, and an empty cache. The object store is moto's
server; its log of requests says what was fetched.
"""

import json
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import psutil
import pytest
from conftest import ROOT, output_of, repro, set_params, stages, yaml
from moto.server import ThreadedMotoServer

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
NO_CREDENTIALS = dict.fromkeys(CREDENTIALS, "") | dict.fromkeys(
    ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/dev/null"
)
PULLING = ("--pull", "--allow-missing")


class Store(logging.Handler):
    """A bucket behind S3's API on this machine, and the keys that were read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.url = "http://{}:{}".format(*self.server.get_host_and_port())
        boto3.client("s3", endpoint_url=self.url, aws_access_key_id="a", aws_secret_access_key="b").create_bucket(
            Bucket="store"
        )

    def emit(self, record: logging.LogRecord) -> None:
        if request := re.search(r'"([A-Z]+) (\S+) HTTP', record.getMessage()):
            self.requests.append((request[1], request[2]))

    def fetched(self) -> set[str]:
        """The md5 of every object that was read since this was last asked."""
        keys = {path for method, path in self.requests if method == "GET"}
        self.requests.clear()
        found = (re.fullmatch(r"/store/micro/files/md5/(..)/(\w{30}(?:\.dir)?)", key) for key in keys)
        return {key[1] + key[2] for key in found if key}

    def close(self) -> None:
        self.server.stop()
        super().close()


class Team:
    """A git repository with a finished run on its main branch, the store with that run's data, and clones of it."""

    def __init__(self, origin: Path, store: Store, paths: dict[str, str]) -> None:
        self.origin, self.store, self.paths = origin, store, paths

    def machine(self, directory: Path, branch: str = "main") -> Path:
        """A fresh clone, and a store that has been asked for nothing yet."""
        subprocess.run(["git", "clone", "--quiet", "--branch", branch, str(self.origin), str(directory)], check=True)
        self.store.requests.clear()
        return directory

    def fetched(self) -> set[str]:
        """The paths of the objects read from the store since the clone or since this was last asked."""
        return {self.paths[md5] for md5 in self.store.fetched()}

    def inputs(self, project: Path, *ran: str) -> set[str]:
        """What these stages read and none of them makes, and the lists of files of the directories that it is in."""
        read = [dep for stage in ran for dep in stages(project)[stage]["deps"]]
        read = [path for path in read if not under(path, made(project, *ran))]
        files = {path for path in self.paths.values() if under(path, read)}
        lists = {path for md5, path in self.paths.items() if md5.endswith(".dir")}
        return files | {path for path in lists if any(under(file, [path]) for file in files)}


def under(path: str, parents: list[str]) -> bool:
    """Whether a path is one of others, or lies below one."""
    return any(Path(path).is_relative_to(parent) for parent in parents)


def made(project: Path, *names: str) -> list[str]:
    """The outputs of stages that DVC caches and pushes."""
    outs = [out for name in names for out in stages(project)[name].get("outs", [])]
    return [out for out in outs if isinstance(out, str)]  # with `cache: false` it is a mapping


def contents(project: Path) -> dict[str, str]:
    """md5 -> path of every output of a finished run: files, directories, and the files in those."""
    paths: dict[str, str] = {}
    for name, stage in yaml.load((project / "dvc.lock").read_text())["stages"].items():
        for md5, path in ((out["md5"], out["path"]) for out in stage["outs"] if out["path"] in made(project, name)):
            paths[md5] = path
            if md5.endswith(".dir"):
                files = json.loads((project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).read_text())
                paths |= {file["md5"]: f"{path}/{file['relpath']}" for file in files}
    return paths


def commit(project: Path, message: str) -> None:
    """Commit all that git does not ignore, and push it."""
    output_of(
        project,
        "git add --all"
        f" && git -c user.name=someone -c user.email=someone@example.org commit --quiet --message '{message}'"
        " && git push --quiet origin HEAD",
    )


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store()
    logger = logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.addHandler(store)
    yield store
    logger.removeHandler(store)
    store.close()


@pytest.fixture(scope="module")
def team(reproduced: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Team:
    """The machine of the first run names the store in .dvc/config, and pushes its run there."""
    directory = tmp_path_factory.mktemp("team")
    first = Path(shutil.copytree(reproduced, directory / "first", symlinks=True))
    output_of(directory, "git init --quiet --bare --initial-branch main origin")
    output_of(first, "git symbolic-ref HEAD refs/heads/main && git remote add origin ../origin")
    shutil.copytree(ROOT / ".dvc/plots", first / ".dvc/plots", ignore=shutil.ignore_patterns("*.html"))
    output_of(first, "dvc remote add --default store s3://store/micro")
    output_of(first, f"dvc remote modify store endpointurl {store.url}")
    output_of(first, "dvc push", **CREDENTIALS)
    commit(first, "the first run")
    return Team(directory / "origin", store, contents(first))


@pytest.mark.slow
def test_1_a_fresh_clone_runs_all_that_git_has_no_result_of_and_asks_no_store(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    # On the same kind of machine the same bits come out, and predictions and scores for those are in git. That every
    # stage runs where there is no dvc.lock yet is asserted where `reproduced` is made.
    assert set(stages(clone)) - set(repro(clone)) == {"evaluate", "reference", "baseline"}
    assert repro(clone) == []
    assert team.store.requests == []


def test_2_after_a_pull_nothing_is_to_be_done(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert team.fetched() == set(team.paths.values())
    assert (clone / "models/medical-reasoner.gguf").read_bytes()[:4] == b"GGUF"
    assert repro(clone, "--allow-missing") == []
    assert output_of(clone, "git status --porcelain") == ""
    assert repro(clone) == ["merge"]  # the one output that is not cached
    assert team.store.requests == []


@pytest.mark.slow
def test_3_another_quantization_merges_again_and_trains_nothing(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    set_params(clone, "quantize", quant_type="Q8_0")
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert team.fetched() == set(team.paths.values())
    assert sorted(repro(clone)) == ["baseline", "evaluate", "merge", "quantize", "report"]
    assert team.store.requests == []


class PullRequest(NamedTuple):
    """A branch with a run of its own, and how its machine came to it."""

    branch: str
    ran: list[str]
    fetched: set[str]
    inputs: set[str]


@pytest.fixture(scope="module")
def pull_request(team: Team, tmp_path_factory: pytest.TempPathFactory) -> PullRequest:
    """Another machine changes a train parameter, and pushes the run to a branch; git alone, not the store."""
    clone = team.machine(tmp_path_factory.mktemp("another") / "clone")
    output_of(clone, "git switch --quiet --create slower")
    set_params(clone, "train", learning_rate=1e-4)
    ran = repro(clone, *PULLING, **CREDENTIALS)
    commit(clone, "train with a lower learning rate")
    return PullRequest("slower", ran, team.fetched(), team.inputs(clone, *ran))


def test_4_another_training_parameter_fetches_what_training_and_the_rest_read(pull_request: PullRequest) -> None:
    assert sorted(pull_request.ran) == ["evaluate", "merge", "quantize", "reference", "report", "train"]
    assert pull_request.fetched == pull_request.inputs
    assert {"data/formatted/train.jsonl", "models/base/model.safetensors"} <= pull_request.fetched
    assert not {"data/raw/ori_pqal.json", "models/medical-reasoner.gguf", "models/adapter"} & pull_request.fetched


def test_5_another_evaluation_parameter_fetches_the_gguf_and_the_test_questions(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    set_params(clone, "evaluate", max_new_tokens=1)
    ran = repro(clone, *PULLING, **CREDENTIALS)
    assert {"evaluate", "baseline"} <= set(ran) <= {"evaluate", "baseline", "report"}
    fetched = team.fetched()
    assert fetched == team.inputs(clone, *ran)
    assert {"models/medical-reasoner.gguf", "data/formatted/test.jsonl"} <= fetched
    assert not {"data/raw/ori_pqal.json", "models/adapter"} & fetched


def test_6_a_pull_request_is_compared_with_what_git_holds(
    team: Team, pull_request: PullRequest, tmp_path: Path
) -> None:
    clone = team.machine(tmp_path / "clone", pull_request.branch)

    def difference(what: str) -> Any:
        return json.loads(output_of(clone, f"dvc {what} diff main --json", **NO_CREDENTIALS))

    rate = {"old": 2e-4, "new": 1e-4, "diff": -1e-4}
    assert difference("params") == {"params.yaml": {"train.learning_rate": pytest.approx(rate)}}
    loss = difference("metrics")["metrics/train.json"]["validation_loss"]
    now = json.loads((clone / "metrics/train.json").read_text())["validation_loss"]
    before = json.loads(output_of(clone, "git show origin/main:metrics/train.json"))["validation_loss"]
    assert loss == pytest.approx({"old": before, "new": now, "diff": now - before})
    assert now != before
    output_of(clone, "python3 -m pipeline.commands.plots --frame-only && dvc plots diff main", **NO_CREDENTIALS)
    page = (clone / "dvc_plots/index.html").read_text()
    assert page.count('"rev": "main"') == page.count('"rev": "workspace"') > 0
    assert team.store.requests == []


# The other sections of params.yaml, by the command that is right for all of them (docs/remotes.md)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "changes", "skipped"),
    [("download", {"seed": 2}, {"base"}), ("base", {"max_steps": 2}, {"download", "format"})],
)
def test_any_other_parameter_after_a_pull(
    section: str, changes: dict[str, int], skipped: set[str], team: Team, tmp_path: Path
) -> None:
    clone = team.machine(tmp_path / "clone")
    set_params(clone, section, **changes)
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert set(stages(clone)) - set(repro(clone)) == skipped
    assert repro(clone) == []


@pytest.mark.slow
def test_a_pull_completes_what_was_fetched_in_part(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    set_params(clone, "report", seed=1)
    ran = repro(clone, *PULLING, **CREDENTIALS)
    assert ran == ["report"]
    assert team.fetched() == team.inputs(clone, *ran)
    assert not (clone / "data/raw/ori_pqal.json").exists()  # the directory is there, and DVC takes it for whole
    set_params(clone, "format", seed=2)
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert sorted(set(stages(clone)) - set(repro(clone))) == ["base", "download"]


@pytest.mark.slow
def test_a_sweep_of_seeds_runs_in_two_workers_and_becomes_mean_and_spread(team: Team, tmp_path: Path) -> None:
    clone = team.machine(tmp_path / "clone")
    output_of(clone, "dvc pull", **CREDENTIALS)
    assert "Queued" in output_of(clone, "dvc exp run --queue -S train.seed=1,2 train && dvc queue status")
    # A worker that finds the queue empty may stay: on a busy machine it was seen to wait for ever, holding our pipe.
    output_of(clone, "dvc queue start --jobs 2 > /dev/null 2>&1")
    while re.search("Queued|Running", status := output_of(clone, "dvc queue status")):
        time.sleep(1)
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(clone):
            process.kill()
    assert status.count("Success") == 2, status
    table = [line.split() for line in output_of(clone, "python3 -m pipeline.commands.experiments").splitlines()]
    (row,) = [row for row in table if "validation_loss" in row]
    number, *figures = row[2], *map(float, row[4:])
    assert number == "2"
    assert figures[2] < figures[0] < figures[3]
    assert figures[1] == pytest.approx((figures[3] - figures[2]) / 2**0.5, abs=1e-3)
    assert output_of(clone, "git status --porcelain") == ""
