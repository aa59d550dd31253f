"""The SkyPilot task: read as far as it can be without the launcher, and its own lines run on two machines."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.branches import git, link_environment
from tests.conftest import ROOT, output_of, run_command, stages_named, yaml
from tests.flows.conftest import pushed, unknown_commands

TASK: dict[str, Any] = yaml.load(ROOT / "infra/skypilot-t4.yaml")


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
        output_of(ROOT, 'bash -n -c "$SCRIPT"', SCRIPT=script)
        assert unknown_commands(script) == set()
    called = [line.strip() for line in TASK["run"].splitlines() if re.match(r"\$dvc (pull|repro)|keep$", line)]
    assert called == ["$dvc pull --allow-missing", "$dvc repro train", "keep", "$dvc repro", "keep"]


@pytest.mark.slow
def test_a_machine_that_is_lost_after_training_costs_no_second_training(committed: Path, tmp_path: Path) -> None:
    """The first machine is gone after training, with its disk."""
    branch, store = tmp_path / "branch.git", tmp_path / "store"
    git(tmp_path, "init", "--quiet", "--bare", str(branch))
    ran: list[list[str]] = []
    for name in ("lost", "next"):
        git(tmp_path, "clone", "--quiet", str(committed), name)
        machine = tmp_path / name
        link_environment(machine)
        (machine / "params.yaml").write_text((machine / "params.yaml").read_text().replace("_alpha: 16", "_alpha: 8"))
        script = TASK["run"].partition("\nkeep\n")[0] + "\nkeep\n" if name == "lost" else TASK["run"]
        environment = {"REMOTE": str(store), "GIT_URL": str(branch), "BRANCH": "run", "SCRIPT": script}
        ran.append(stages_named(output_of(machine, 'bash -c "$SCRIPT"', **environment)))
        shutil.rmtree(machine)
    assert ["train" in names for names in ran] == [True, False]
    assert "evaluate" in ran[1]
    git(tmp_path, "clone", "--quiet", "--branch=run", str(branch), "home")  # what came of it: a branch to review
    assert yaml.load(tmp_path / "home/params.yaml")["train"]["lora_alpha"] == 8
    assert run_command(tmp_path / "home", "python3 -m pipeline lock").returncode == 0
    assert pushed(store, tmp_path / "home")
