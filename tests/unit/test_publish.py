"""`python -m pipeline publish`: what goes to the hub, under which names, and what is refused before."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pipeline.commands import publish
from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from pipeline.models.gguf_header import LLAMA_3_LICENCE
from tests.hub import Answer, Server, serve
from tests.tables import write_gguf

NAME, OTHER = "medical-reasoner-8B-Q4_K_M.gguf", "medical-reasoner-8B-IQ3_XS.gguf"
GGUF, RELEASE = Path("medical-reasoner.gguf"), Path("release")


@pytest.fixture
def hub(reported: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub without Xet; the working directory has a release."""
    monkeypatch.chdir(reported)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        yield server


def run(really: bool, repo_id: str = "someone/medical-reasoner") -> None:
    publish.main(repo_id, really, RELEASE, GGUF)


def test_without_upload_it_lists_names_and_sizes_and_sends_nothing(
    hub: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run(really=False)
    out = capsys.readouterr().out
    assert re.search(rf"^ +{GGUF.stat().st_size:,}  {NAME}$", out, re.MULTILINE)
    assert "make publish REPO=someone/medical-reasoner PUBLISH=1" in out
    assert hub.requests == []


def test_the_repository_holds_the_release_and_every_gguf_under_its_public_name(hub: Server) -> None:
    run(really=True)
    files = hub.committed
    assert files.keys() == {path.name for path in RELEASE.iterdir()} | {NAME, OTHER}
    assert files[NAME] == GGUF.read_bytes()
    sums = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in (NAME, OTHER)]
    assert files["SHA256SUMS"].decode() == "".join(sums)
    assert files["Modelfile"].decode().startswith(f"FROM {NAME}\n")
    for page in ("Modelfile", "RUN.md", "README.md"):
        text = files[page].decode()
        assert not re.search(rf"(?<!models/){GGUF.name}|quantized/|release/", text), page
        assert page == "Modelfile" or {f"| `{NAME}` |", f"| `{OTHER}` |"} <= set(re.findall(r"\| `.*?` \|", text))
    assert hub.count("/api/repos/create") == 1


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/api/repos/create", 401, "refuses to write"),
        ("/api/models/someone/medical-reasoner/commit/main", 403, "refuses to write"),
        ("/api/models/someone/medical-reasoner/commit/main", 500, r"could not be written \(HTTP 500\)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: Server, path: str, status: int, sentence: str) -> None:
    hub.answers[path] = [Answer(status)]
    with pytest.raises(Fail, match=sentence) as error:
        run(really=True)
    assert "hf_made_up" not in str(error.value)
    assert not hub.committed


def test_no_token_no_name_and_another_file_are_refused_before_anything_is_sent(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo_id in ("", "medical-reasoner", "a/b/c", "a b/c"):
        with pytest.raises(Fail, match="OWNER/NAME"):
            run(really=True, repo_id=repo_id)
    write_gguf(tmp_path / GGUF.name, system_prompt="another")
    with pytest.raises(Fail, match="of another file"):
        publish.main("a/b", True, RELEASE, tmp_path / GGUF.name)
    with pytest.raises(Fail, match="is no release"):
        publish.main("a/b", True, tmp_path, GGUF)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(Fail, match="HF_TOKEN"):
        run(really=True)
    assert hub.requests == []


def test_a_llama_3_needs_its_name_and_its_licence(tmp_path: Path) -> None:
    write_gguf(tmp_path / GGUF.name, name="Llama-3-8B-medical-reasoner", licence=LLAMA_3_LICENCE)
    pages: dict[str, Any] = {
        "SHA256SUMS": f"{sha256(tmp_path / GGUF.name)}  ../{GGUF.name}\n",
        **dict.fromkeys(publish.MOVED, ""),
    }
    release = tmp_path / "release"
    release.mkdir()
    for name, text in pages.items():
        (release / name).write_text(text)
    with pytest.raises(Fail, match="requires a name"):
        publish.collect("a/medical-reasoner", release, tmp_path / GGUF.name)
    with pytest.raises(Fail, match="no LICENSE"):
        publish.collect("a/Llama-3-medical-reasoner", release, tmp_path / GGUF.name)
    (release / "LICENSE").write_text("the licence")
    names = publish.collect("a/Llama-3-medical-reasoner", release, tmp_path / GGUF.name)
    assert "Llama-3-medical-reasoner-8B-Q4_K_M.gguf" in names
