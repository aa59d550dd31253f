"""A run in git: `make release-run` puts it there, a fresh clone pulls it offline, other projects get the GGUF."""

import functools
import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.commands import release_run
from pipeline.core.errors import Fail
from tests.branches import commit, git, link_environment
from tests.conftest import ALONE, alone_possible, output_of, repro, run_command, stages
from tests.flows.conftest import GGUF, cached, contents, copy_of, hashes


@pytest.fixture(scope="module")
def released(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro run after `make release-run`, committed, with a version."""
    directory = copy_of(committed, tmp_path_factory.mktemp("release") / "released")
    link_environment(directory)
    assert "staged for git: commit both together" in output_of(directory, "make release-run")
    commit(directory, "a release")
    git(directory, "tag", "--annotate", "medical-reasoner@v1.0.0", "--message", "1.0.0")
    return directory


@pytest.fixture
def copy(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to change, which is the working directory."""
    directory = copy_of(released, tmp_path / "copy")
    monkeypatch.chdir(directory)
    return directory


def objects(project: Path) -> list[Path]:
    return sorted(path for path in (project / ".dvc/release").rglob("*") if path.is_file())


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_bare_pull_on_a_fresh_clone_brings_every_output_without_a_network(released: Path, tmp_path: Path) -> None:
    assert {path.parent.name + path.name for path in objects(released)} == contents(released).keys()
    git(tmp_path, "clone", "--quiet", str(released), "clone")
    clone = tmp_path / "clone"
    output_of(clone, f"{ALONE} dvc pull" if alone_possible else "dvc pull")
    assert (clone / GGUF).read_bytes()[:4] == b"GGUF"
    assert [path for path in cached(clone, *stages(clone)) if not (clone / path).exists()] == []
    assert repro(clone, "--allow-missing") == []
    assert git(clone, "status", "--porcelain") == ""


@pytest.fixture(scope="module")
def web(released: Path) -> Iterator[str]:
    """The files over HTTP, as a hosting service shows them."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(released))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_another_project_gets_the_gguf_from_a_path_and_from_a_url(released: Path, web: str, tmp_path: Path) -> None:
    version = "medical-reasoner --rev v1.0.0"
    # DVC looks for a relative remote of a URL's repository in the root of this machine's disk.
    remote = f"--remote raw --remote-config url={web}/.dvc/release"
    output_of(tmp_path, f"dvc get {released} {GGUF} -o path")
    output_of(tmp_path, f"dvc artifacts get {released} {version} -o version")
    output_of(tmp_path, f"dvc get file://{released} {GGUF} -o url {remote}")
    output_of(tmp_path, f"dvc artifacts get file://{released} {version} -o url-version {remote}")
    found = {path.name: md5(path) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(("path", "version", "url", "url-version"), hashes(released)[GGUF])


# What puts a run there, and what does not


@pytest.mark.slow
def test_a_new_release_removes_what_the_run_has_not_and_stages_the_rest(copy: Path) -> None:
    before = objects(copy)
    stale = copy / ".dvc/release/files/md5/00/stale"
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    assert "release" not in git(copy, "status", "--porcelain")  # git ignores what lands there otherwise
    git(copy, "add", "--force", ".dvc/release")
    commit(copy, "stale")
    before[0].unlink()
    release_run.main()
    assert objects(copy) == before
    assert git(copy, "diff", "--cached", "--name-status").split() == ["D", ".dvc/release/files/md5/00/stale"]
    assert git(copy, "diff", "--name-only") == ""


@pytest.mark.slow
def test_a_run_that_is_too_large_or_not_here_is_refused_and_the_release_stays(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_run, "LIMIT", 1000)
    with pytest.raises(Fail, match=r"more than the limit of .*dvc remote add --default"):
        release_run.main()
    shutil.rmtree(copy / ".dvc/cache")
    with pytest.raises(Fail, match=r"data/raw of dvc.lock is not in DVC's cache; run `dvc repro`"):
        release_run.main()
    assert git(copy, "status", "--porcelain", "--", ".dvc") == ""


@pytest.mark.slow
def test_push_refuses_the_release_and_names_the_command_that_sets_another_remote(copy: Path, tmp_path: Path) -> None:
    before = objects(copy)
    refused = run_command(copy, "make push")
    assert refused.returncode != 0
    sentence, *_ = refused.stderr.splitlines()
    assert sentence.startswith("push: the default remote is .dvc/release")
    command = sentence.split("set yours: ")[1]
    output_of(copy, command.replace("NAME", "mine").replace("URL", str(tmp_path / "store")))
    output_of(copy, "make push")
    assert len([path for path in (tmp_path / "store").rglob("*") if path.is_file()]) == len(before)
    assert objects(copy) == before
    assert git(copy, "status", "--porcelain", "--", ".dvc") == ""
