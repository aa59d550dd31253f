"""The notebook is run on the micro profile; what is rented is read as far as it can be without the launcher."""

import copy
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from branches import commit, git, link_environment
from conftest import ROOT, run_command, yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = nbformat.read(ROOT / "notebooks/medical_reasoner_colab.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
SCRIPTS = [cell.source for cell in CODE if cell.source.startswith("%%bash\n")]
TASK: dict[str, Any] = yaml.load(ROOT / "infra/skypilot-t4.yaml")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))

# In place of setup/install.sh, which takes minutes and has tests of its own.
SETUP = f"""#!/bin/sh
set -e
mkdir .venv
for entry in {sys.prefix}/*; do [ "${{entry##*/}}" = ready ] || ln -s "$entry" .venv; done
touch .venv/ready
"""


@pytest.fixture(scope="module")
def origin(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository to clone: the micro run, its data in a cache that every clone on this machine shares."""
    directory = Path(shutil.copytree(micro, tmp_path_factory.mktemp("rent") / "origin"))
    for name in (".gitignore", "Makefile", "constraints.txt", "profiles/micro.yaml"):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, directory / name)
    (directory / "setup").mkdir()
    (directory / "setup/install.sh").write_text(SETUP)
    (directory / "setup/install.sh").chmod(0o755)
    git(directory, "init", "--quiet", "--initial-branch=main")
    done = run_command(directory, f"python3 -m dvc cache dir --quiet {directory.parent}/cache && dvc commit -q --force")
    assert done.returncode == 0, done.stderr
    commit(directory, "a run")
    return directory


def pushed(store: Path, project: Path) -> bool:
    """Whether a DVC remote in a directory holds the GGUF that a project's dvc.lock names."""
    outs = yaml.load(project / "dvc.lock")["stages"]["quantize"]["outs"]
    (md5,) = (out["md5"] for out in outs if out["path"] == "models/medical-reasoner.gguf")
    return (store / "files/md5" / md5[:2] / md5[2:]).is_file()


# The notebook


def test_the_notebook_is_valid_and_holds_no_output() -> None:
    nbformat.validate(NOTEBOOK)
    assert not any(cell.outputs or cell.execution_count for cell in CODE)


def test_its_cells_are_thin_and_a_failing_command_fails_them() -> None:
    assert len(SCRIPTS) >= 6
    assert all(script.splitlines()[1] == "set -e" for script in SCRIPTS)
    for cell in CODE:
        assert len(cell.source.splitlines()) <= 12
        assert not re.search(r"^[!%](?!%bash\n)", cell.source, re.MULTILINE)  # `!cmd` passes when it fails


def test_the_commands_and_files_that_it_names_exist() -> None:
    text = "\n".join(SCRIPTS)
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert {"pipeline.commands.summary", "pipeline.commands.ask"} <= set(modules)
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= TARGETS
    profiles = re.findall(r"llama3-[\w-]+t4|\btiny\b", "\n".join(cell.source for cell in NOTEBOOK.cells))
    assert len(set(profiles)) > 1
    assert all((ROOT / f"profiles/{name}.yaml").is_file() for name in profiles)
    assert (ROOT / "docs/rent-a-t4.md").is_file()


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


def test_the_notebook_runs_from_a_clone_to_a_pushed_model(origin: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    printed = execute(tmp_path, REPOSITORY=origin, PROFILE="micro", REMOTE=store)
    assert "Stage 'report' is cached" in printed  # the run itself has tests of its own
    assert "40 test questions" in printed
    assert "<IPython.core.display.SVG object>" in printed
    assert re.search(r"^(yes|no|maybe) \d+\.\d%", printed, re.MULTILINE)
    assert pushed(store, tmp_path / "medical-reasoner")


def test_the_settings_cell_takes_effect_every_time_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPOSITORY", "PROFILE", "GPU", "TORCH_INDEX", "REMOTE"):
        monkeypatch.setenv(name, "of an earlier run")
    exec(CODE[0].source)
    assert os.environ["PROFILE"] == "tiny"
    exec(CODE[0].source.replace('"GPU": ""', '"GPU": "1"'))
    assert os.environ["GPU"] == "1"


def test_a_notebook_whose_command_fails_stops_there(origin: Path, tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match=r"profiles/no-such-profile\.yaml"):
        execute(tmp_path, REPOSITORY=origin, PROFILE="no-such-profile")
    assert not (tmp_path / "medical-reasoner/models/medical-reasoner.gguf").exists()


# The rented card


def test_the_task_is_a_spot_t4_that_ends_itself() -> None:
    """SkyPilot cannot be installed beside DVC (click<8.2): its own parser read the file when it was written."""
    assert set(TASK) == {"name", "resources", "workdir", "envs", "secrets", "setup", "run"}
    resources = TASK["resources"]
    assert set(resources) == {"accelerators", "use_spot", "disk_size", "image_id", "autostop"}
    assert (resources["accelerators"], resources["use_spot"], resources["autostop"]["down"]) == ("T4:1", True, True)
    assert TASK["workdir"] == "."
    assert all(not value for value in TASK["secrets"].values())


def test_the_task_s_commands_exist_and_stop_at_the_first_that_fails() -> None:
    for script in (TASK["setup"], TASK["run"]):
        assert script.startswith("set -e\n")
        assert run_command(ROOT, 'bash -n -c "$SCRIPT"', SCRIPT=script).returncode == 0
        assert set(re.findall(r"^make ([a-z-]+)", script, re.MULTILINE)) <= TARGETS
        for module in re.findall(r"python -m ([\w.]+)", script):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    called = [line.strip() for line in TASK["run"].splitlines() if re.match(r"\$dvc (pull|repro)|keep$", line)]
    assert called == ["$dvc pull --allow-missing", "$dvc repro train", "keep", "$dvc repro", "keep"]


@pytest.mark.slow
def test_a_machine_that_is_lost_after_training_costs_no_second_training(origin: Path, tmp_path: Path) -> None:
    """The task's own lines on two machines: the first is gone after training, with its disk."""
    branch, store = tmp_path / "branch.git", tmp_path / "store"
    git(tmp_path, "init", "--quiet", "--bare", str(branch))
    printed: list[str] = []
    for name in ("lost", "next"):
        git(tmp_path, "clone", "--quiet", str(origin), name)
        machine = tmp_path / name
        link_environment(machine)
        (machine / "params.yaml").write_text((machine / "params.yaml").read_text().replace("_alpha: 16", "_alpha: 8"))
        run_command(machine, "python3 -m dvc cache dir --quiet --unset")  # a cache of its own
        script = TASK["run"].partition("\nkeep\n")[0] + "\nkeep\n" if name == "lost" else TASK["run"]
        environment = {"REMOTE": str(store), "GIT_URL": str(branch), "BRANCH": "run", "SCRIPT": script}
        done = run_command(machine, 'bash -c "$SCRIPT"', **environment)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
        shutil.rmtree(machine)
    assert ["Running stage 'train'" in text for text in printed] == [True, False]
    assert "Running stage 'evaluate'" in printed[1]
    git(tmp_path, "clone", "--quiet", "--branch=run", str(branch), "home")  # what came of it: a branch to review
    assert yaml.load(tmp_path / "home/params.yaml")["train"]["lora_alpha"] == 8
    assert run_command(tmp_path / "home", "python3 -m pipeline.commands.lock").returncode == 0
    assert pushed(store, tmp_path / "home")


def test_the_page_names_no_price() -> None:
    page = (ROOT / "docs/rent-a-t4.md").read_text()
    assert not re.search(r"[$€£] ?\d|\d ?(USD|EUR|dollars)", page)  # they change by the day
