"""The notebook, run on the micro profile from a clone to a pushed model."""

import copy
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.branches import commit
from tests.conftest import ROOT, output_of
from tests.flows.conftest import GGUF, copy_of, pushed, unknown_commands

NOTEBOOK = nbformat.read(ROOT / "notebooks/medical_reasoner_colab.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
SCRIPTS = [cell.source for cell in CODE if cell.source.startswith("%%bash\n")]


def test_its_cells_hold_no_output_and_a_failing_command_fails_them() -> None:
    nbformat.validate(NOTEBOOK)
    assert not any(cell.outputs or cell.execution_count for cell in CODE)
    assert len(SCRIPTS) >= 5
    assert all(script.splitlines()[1] == "set -e" for script in SCRIPTS)
    # `!cmd` passes when it fails
    assert [cell for cell in CODE if re.search(r"^[!%](?!%bash\n)", cell.source, re.MULTILINE)] == []


def test_the_commands_and_profiles_that_it_names_exist() -> None:
    assert unknown_commands("\n".join(SCRIPTS)) == set()
    profiles = set(
        re.findall(r"llama3-[\w-]+t4|smollm2-\w+|\btiny\b", "\n".join(cell.source for cell in NOTEBOOK.cells))
    )
    assert len(profiles) == 3
    assert [name for name in profiles if not (ROOT / f"profiles/{name}.yaml").is_file()] == []


def test_the_settings_cell_takes_effect_every_time_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPOSITORY", "PROFILE", "GPU", "REMOTE"):
        monkeypatch.setenv(name, "of an earlier run")
    exec(CODE[0].source)
    assert os.environ["PROFILE"] == "tiny"
    exec(CODE[0].source.replace('"GPU": ""', '"GPU": "1"'))
    assert os.environ["GPU"] == "1"


@pytest.fixture(scope="module")
def origin(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose cache is shared by every clone on this machine: the run itself has tests of its own."""
    directory = copy_of(committed, tmp_path_factory.mktemp("notebook") / "origin")
    shutil.move(directory / ".dvc/cache", directory.parent / "cache")
    output_of(directory, f"dvc cache dir --quiet {directory.parent}/cache")
    commit(directory, "a shared cache")
    return directory


def execute(directory: Path, **settings: object) -> str:
    """Run the notebook in `directory` with values put into its settings cell, as a user edits it; what it printed."""
    notebook = nbformat.from_dict(copy.deepcopy(NOTEBOOK))
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in settings.items():
        cell.source, count = re.subn(rf'"{name}": "[^"]*"', f'"{name}": "{value}"', cell.source)
        assert count == 1
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") or f"{output.get('data')}\n" for output in outputs)


@pytest.mark.slow
def test_it_runs_from_a_clone_to_a_pushed_model_and_can_be_run_again(origin: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    printed = execute(tmp_path, REPOSITORY=origin, PROFILE="micro", REMOTE=store)
    assert "Stage 'report' is cached" in printed
    assert "20 test questions" in printed
    assert "<IPython.core.display.SVG object>" in printed
    assert re.search(r"^(yes|no|maybe) \d+\.\d%", printed, re.MULTILINE)
    assert pushed(store, tmp_path / "medical-reasoner")
    printed = execute(tmp_path, REPOSITORY=origin, PROFILE="micro", REMOTE=store)  # every cell once more
    assert "Data and pipelines are up to date" in printed


@pytest.mark.slow
def test_a_command_that_fails_stops_it(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match=r"profiles/no-such-profile\.yaml"):
        execute(tmp_path, REPOSITORY=origin, PROFILE="no-such-profile")
    assert not (tmp_path / "medical-reasoner" / GGUF).exists()
