"""A stage refuses to run with other versions than set-up installed."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline.core import packages
from pipeline.core.errors import Fail
from pipeline.core.packages import check_packages, read_pins

FILES = {
    "pyproject.toml": "[project.optional-dependencies]\n"
    'train = ["torch==2.13.0", "trl==1.14.2"]\ngpu-only = ["unsloth==1.0"]\nother = ["numpy==1.0"]\n',
    "dvc.yaml": "stages: {train: {params: [train, {pyproject.toml: "
    "[project.optional-dependencies.train, project.optional-dependencies.gpu-only]}]}}",
    "constraints-gpu.txt": "# a card\ntorch==2.11.0+cu128\ntrl==1.14.2\n",
}
CPU, GPU = "constraints.txt\n", "constraints-gpu.txt\n"


@pytest.mark.parametrize(
    ("ready", "changes", "words"),
    [
        (CPU, {}, []),  # unsloth is not installed, and numpy is none of the stage's
        (
            CPU,
            {"torch": "2.12.0+cpu", "unsloth": "2.0"},
            ["torch is 2.12.0, pinned 2.13.0", "unsloth is 2.0, pinned 1.0"],
        ),
        (GPU, {"torch": "2.11.0+cu128"}, []),
        (GPU, {}, ["constraints-gpu.txt: torch is 2.13.0, pinned 2.11.0", "make setup GPU=1`"]),
        ("", {"trl": "1.0"}, ["constraints.txt: trl is 1.0, pinned 1.14.2", "make setup`"]),  # of an older set-up
        (None, {"torch": "1.0"}, []),  # an environment that set-up did not make
    ],
    ids=["cpu", "cpu, others", "gpu", "gpu, others", "older", "not made"],
)
def test_every_version_that_is_not_its_sets_is_named_and_local_labels_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: str | None, changes: dict[str, str], words: list[str]
):
    installed = {"torch": "2.13.0+cpu", "trl": "1.14.2", "numpy": "9"} | changes

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(packages, "version", version)
    monkeypatch.chdir(tmp_path)
    for name, text in {**FILES, **({} if ready is None else {"ready": ready})}.items():
        (tmp_path / name).write_text(text)
    said = ""
    try:
        check_packages("train", tmp_path)
    except Fail as error:
        said = str(error)
    assert ([word for word in words if word not in said], said != "") == ([], bool(words))


def test_names_and_versions_are_read_in_all_their_spellings():
    lines = ["A_b[x,y]==1.2", "c.d==3+cpu", " e==1.0rc1 ", "# f==1", "g>=1", ""]
    assert read_pins(lines) == {"a-b": "1.2", "c-d": "3", "e": "1.0rc1"}
