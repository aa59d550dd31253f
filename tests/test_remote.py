"""The committed run: git holds its data, so a fresh clone pulls with no network, and other projects get the GGUF."""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, output_of, run_command, stages, stages_named, yaml
from pages import blocks

from pipeline.commands import release_run as remote
from pipeline.core.stage import Fail

GGUF = "models/medical-reasoner.gguf"
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone of what is committed here, as long as that names no remote of its own."""
    directory = tmp_path_factory.mktemp("release") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(directory)], check=True)
    if output_of(directory, "dvc config --project core.remote").strip() != "release":
        pytest.skip("this project's runs live in another remote")
    return directory


@pytest.fixture(scope="module")
def pulled(clone: Path) -> Path:
    """The clone after a bare `dvc pull`, in a network namespace without interfaces where there are such."""
    offline = "unshare --map-root-user --net " if run_command(clone, "unshare -rn true").returncode == 0 else ""
    output_of(clone, f"{offline}dvc pull")
    return clone


@pytest.fixture
def copy(pulled: Path, tmp_path: Path) -> Path:
    """A copy of the pulled clone to change, with a set-up .venv."""
    directory = Path(shutil.copytree(pulled, tmp_path / "copy", symlinks=True))
    (directory / ".venv").symlink_to(sys.prefix)
    return directory


def objects(project: Path) -> list[Path]:
    return sorted(path for path in (project / ".dvc/release").rglob("*") if path.is_file())


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# What git holds


def test_git_holds_every_output_of_the_committed_run_and_nothing_else(clone: Path) -> None:
    lock, folder = yaml.load(clone / "dvc.lock")["stages"], clone / ".dvc/release/files/md5"
    cached = {
        name: [out for out in stage.get("outs", []) if isinstance(out, str)] for name, stage in stages(clone).items()
    }
    expected = {out["md5"] for name in cached for out in lock[name]["outs"] if out["path"] in cached[name]}
    for directory in [name for name in expected if name.endswith(".dir")]:
        expected |= {file["md5"] for file in json.loads((folder / directory[:2] / directory[2:]).read_text())}
    hint = "`make release-run`, then commit .dvc/release and dvc.lock together"
    assert objects(clone) == sorted(folder / name[:2] / name[2:] for name in expected), hint


def test_every_object_has_the_content_that_its_name_says(clone: Path) -> None:
    for path in objects(clone):
        assert md5(path) == path.parent.name + path.name.removesuffix(".dir")


def test_the_objects_are_8_megabytes_at_most(clone: Path) -> None:
    assert 0 < sum(path.stat().st_size for path in objects(clone)) <= 8_000_000


def test_git_ignores_whatever_else_lands_there(copy: Path) -> None:
    (copy / ".dvc/release/files/md5/00").mkdir()
    (copy / ".dvc/release/files/md5/00/eight-billion").touch()
    assert "release" not in output_of(copy, "git add --all && git status --porcelain")


# What a fresh clone does with it


def test_a_bare_pull_on_a_fresh_clone_brings_every_output(pulled: Path) -> None:
    assert (pulled / GGUF).read_bytes()[:4] == b"GGUF"
    for stage in stages(pulled).values():
        assert all((pulled / out).exists() for out in stage.get("outs", []) if isinstance(out, str))
    assert output_of(pulled, "git status --porcelain") == ""


def test_after_a_pull_nothing_is_left_to_do(pulled: Path) -> None:
    would_run = stages_named(output_of(pulled, "dvc repro --dry --allow-missing"))
    assert would_run == [], "dvc.lock is older than the code: `make repro`, `make release-run`, commit"


@pytest.fixture(scope="module")
def tagged(clone: Path) -> Path:
    output_of(clone, "git -c user.name=a -c user.email=a@b.c tag --annotate medical-reasoner@v1.0.0 --message 1.0.0")
    return clone


@pytest.fixture(scope="module")
def web(clone: Path) -> Iterator[str]:
    """The clone's files over HTTP, as a hosting service shows them."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(clone))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


GET = {
    "a path": f"dvc get {{clone}} {GGUF} -o got",
    "an artifact": "dvc artifacts get {clone} medical-reasoner -o got",
    "a version": "dvc artifacts get {clone} medical-reasoner --rev v1.0.0 -o got",
    # DVC looks for a relative remote of a URL's repository in the root of this machine's disk.
    "a URL": f"dvc get file://{{clone}} {GGUF} -o got --remote raw --remote-config url={{web}}/.dvc/release",
    "a URL's version": "dvc artifacts get file://{clone} medical-reasoner --rev v1.0.0 -o got"
    " --remote raw --remote-config url={web}/.dvc/release",
}


@pytest.mark.parametrize("way", GET)
def test_the_gguf_is_had_without_the_project(way: str, tagged: Path, web: str, tmp_path: Path) -> None:
    output_of(tmp_path, GET[way].format(clone=tagged, web=web))
    (locked,) = [out for out in yaml.load(tagged / "dvc.lock")["stages"]["quantize"]["outs"] if out["path"] == GGUF]
    assert md5(tmp_path / "got") == locked["md5"]


def test_another_project_gets_the_gguf_with_the_lines_of_the_page(clone: Path, tmp_path: Path) -> None:
    (lines,) = [block.text for block in blocks("sh", "docs/remotes.md") if block.text.startswith("dvc get ../")]
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(clone), str(tmp_path / "medical-reasoner")], check=True)
    (tmp_path / "other").mkdir()
    who = {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
    output_of(tmp_path / "other", f"set -e\n{lines}", **who)
    found = {path.name: md5(path) for path in (tmp_path / "other").iterdir()}
    assert found.keys() == {"medical-reasoner.gguf", "medical-reasoner-v1.0.0.gguf"}
    (locked,) = [out for out in yaml.load(clone / "dvc.lock")["stages"]["quantize"]["outs"] if out["path"] == GGUF]
    assert set(found.values()) == {locked["md5"]}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_the_artifact_tells_the_truth_for_every_profile(profile: Path, tmp_path: Path) -> None:
    from dvc.repo import Repo

    for name in ("dvc.yaml", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copyfile(profile, tmp_path / "params.yaml")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    with Repo(str(tmp_path)) as repo:
        artifact = repo.artifacts.read()["dvc.yaml"]["medical-reasoner"]
    params: dict[str, Any] = yaml.load(profile)
    assert (artifact.path, artifact.type) == (GGUF, "model")
    assert artifact.desc
    assert "gguf" in artifact.labels
    assert artifact.meta == {
        "base_model": params["base"]["source"],
        "data": params["download"]["source"],
        "quantization": params["quantize"]["quant_type"],
    }


# What puts it there, and what does not


def test_a_new_release_removes_what_the_run_has_not_and_stages_the_rest(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = objects(copy)
    stale = copy / ".dvc/release/files/md5/00/stale"
    stale.parent.mkdir()
    stale.touch()
    output_of(copy, "git add --force .dvc/release && git -c user.name=a -c user.email=a@b.c commit --quiet -m stale")
    before[0].unlink()
    monkeypatch.chdir(copy)
    remote.main()
    assert objects(copy) == before
    assert output_of(copy, "git diff --cached --name-status").split() == ["D", ".dvc/release/files/md5/00/stale"]
    assert output_of(copy, "git diff --name-only") == ""


def test_a_run_that_is_too_large_is_refused_and_the_release_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    monkeypatch.setattr(remote, "LIMIT", 1_000_000)
    with pytest.raises(Fail, match=r"git takes 1 at most; .*dvc remote add --default"):
        remote.main()
    assert output_of(copy, "git status --porcelain -- .dvc") == ""


def test_a_run_that_is_not_here_is_refused_and_the_release_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy / ".dvc/cache")
    monkeypatch.chdir(copy)
    with pytest.raises(Fail, match=r"data/raw of dvc.lock is not in DVC's cache; run `dvc repro`"):
        remote.main()
    assert output_of(copy, "git status --porcelain -- .dvc") == ""


def test_push_refuses_the_release_and_names_the_command_that_sets_another_remote(copy: Path, tmp_path: Path) -> None:
    before = objects(copy)
    push = "make --old-file .venv/ready push"  # whatever its age, .venv is not made anew here
    refused = run_command(copy, push)
    assert refused.returncode != 0
    sentence, *_ = refused.stderr.splitlines()
    assert sentence.startswith("push: the default remote is .dvc/release")
    command = sentence.split("set yours: ")[1]
    output_of(copy, command.replace("NAME", "mine").replace("URL", str(tmp_path / "store")))
    output_of(copy, push)
    assert len([path for path in (tmp_path / "store").rglob("*") if path.is_file()]) == len(before)
    assert objects(copy) == before
    assert output_of(copy, "git status --porcelain -- .dvc") == ""
