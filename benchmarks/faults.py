"""Kill the micro profile's run at seeded moments, and compare what it ends with to an uninterrupted run.

`python -m benchmarks.faults` runs `dvc repro` with SIGKILLs in every stage, and in DVC while it writes what a stage
left, until everything has run. Two thirds of the kills fall on a write or rename. `python -m
benchmarks.bad_inputs` has bad input; the tests have the other faults: full disk, damaged files and downloads, locks, no
memory, no network.
"""

import argparse
import getpass
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from benchmarks.machine import HERE, LOGS, ROOT, environment
from benchmarks.record import Figures, record
from benchmarks.tables import STAGES as ALL
from pipeline.core.files import sha256

STAGES = tuple(ALL)
VICTIMS = {"stage": "the stage", "group": "DVC and the stage", "dvc": "DVC alone"}
# When: at a share of a stage's time, at one of its changes of files, or at one of DVC's after it; then in words.
POINTS = {
    "time": "at a time in",
    "write": "at a write of",
    "dvc.lock": "writing dvc.lock after",
    "dvc": "writing after",
}
SHELLS = ("/bin/bash", "/bin/sh")  # DVC starts a stage in the shell that SHELL names
VOLATILE = "_resources.json"  # seconds and memory: another every time
TRIES = 4  # runs of `dvc repro` that may fail after a kill, before it counts as lost
GONE = 2.0  # seconds in which all of a run is gone after a kill
PROBE = re.compile(r"\.[\w-]{22}\.tmp")  # DVC tests with it which links the disk has; nothing ever reads it
WAYS_OUT = {  # what DVC says of a truncated or stale file after its kill, and the remedy in docs/troubleshooting.md
    r"is busy, it is being blocked by|RWLock-file": "rm -f .dvc/tmp/rwlock",
    r"\.git/\S+\.lock'\): \[Errno 17\]": "find .git -name '*.lock' -delete",
    r"dvc\.lock' (validation failed|is invalid)|failed to reproduce '\w+': $": "cp .dvc/tmp/dvc.lock dvc.lock",
}
Measured = dict[str, dict[str, float]]  # by stage: the number of its changes of files, and of DVC's; its seconds


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: at the n-th change of a file, or after a share of the stage's time; `at` is that share in both."""

    stage: str
    whom: str
    point: str
    at: float  # 0 to 1
    after: float = 0.0  # seconds after the write began
    shell: str = SHELLS[0]


def plan(kills: int, seed: int, stages: tuple[str, ...] = STAGES) -> list[Kill]:
    """Seeded kills, three to a stage in turn: at a time, at a write of the stage's, at one of DVC's own after it."""
    rng = random.Random(seed)
    chosen: list[Kill] = []
    for i in range(kills):
        visit = i // 3
        own = ("dvc", "dvc.lock")[(visit + visit // len(stages)) % 2]
        point = ("time", "write", own)[i % 3]
        whom = "dvc" if point == own else rng.choice(list(VICTIMS))
        after = rng.choice({"write": [0.0, 0.0, 0.002], "dvc.lock": [0.0, 0.005, 0.01]}.get(point, [0.0]))
        at = rng.random() * (0.8 if point == "time" else 1.0)  # a stage can be quicker than it was when measured
        chosen.append(Kill(stages[visit % len(stages)], whom, point, at, after, rng.choice(SHELLS)))
    return chosen


def repro(project: Path, output: Any, **more: str) -> subprocess.Popen[str]:
    """`dvc repro` with the hook that kills, with a new TMPDIR and HOME, without the run cache, in its own session.

    Its output goes into a file, because a pipe stays open as long as a stage lives.
    """
    for name in ("tmp", "home"):
        (project.parent / name).mkdir(exist_ok=True)
    places = {"TMPDIR": str(project.parent / "tmp"), "HOME": str(project.parent / "home")}
    given = environment(PYTHONPATH=str(HERE / "kill"), **places, **more)
    given = {name: value for name, value in given.items() if not name.startswith("XDG_")}
    command = [sys.executable, "-m", "dvc", "repro", "--no-run-cache"]
    return subprocess.Popen(command, cwd=project, env=given, stdout=output, stderr=output, start_new_session=True)


def running(process: subprocess.Popen[str], stage: str) -> psutil.Process | None:
    """The process of that stage below `process`, once it is there."""
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.cmdline()[1:4] == ["-m", "pipeline.run", stage]:
                return child
    return None


def kill_at_a_time(process: subprocess.Popen[str], kill: Kill, seconds: float) -> str:
    """Kill after a share of the stage's seconds, and say so; empty if the stage was gone by then."""
    child = None
    while process.poll() is None and (child := child or running(process, kill.stage)) is None:
        time.sleep(0.002)
    time.sleep(kill.at * seconds)
    if not child or not alive(child):
        return ""
    with suppress(psutil.Error, ProcessLookupError):
        match kill.whom:
            case "group":
                os.killpg(process.pid, signal.SIGKILL)
            case "dvc":
                process.kill()
            case _:
                child.kill()
    return f"{kill.at * seconds:.2f} seconds after its start"


def alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def outliving(session: int) -> list[str]:
    """The command lines of that session's processes that are still there after GONE seconds, which ends them."""

    def members() -> Iterator[psutil.Process]:
        for pid in psutil.pids():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(pid) == session and alive(process := psutil.Process(pid)):
                    yield process

    end, found = time.monotonic() + GONE, list[str]()
    while list(members()) and time.monotonic() < end:
        time.sleep(0.05)
    for process in members():
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
            process.kill()
    return found


def take_way_out(project: Path, output: str) -> str:
    """Apply the documented remedy for what `dvc repro` said, and return both; raises RuntimeError if there is none."""
    for line in output.splitlines():
        for pattern, command in WAYS_OUT.items():
            if re.search(pattern, line):
                subprocess.run(command, shell=True, cwd=project, check=True)
                return f"{line.strip().replace(f'{project}/', '')[:90]} (`{command}`)"
    raise RuntimeError(f"`dvc repro` failed, and no kill was why: {output[-600:]}")


def forget(project: Path, *stages: str) -> None:
    """Make DVC run the stages again."""
    path, yaml = project / "dvc.lock", YAML()
    if path.exists():
        lock: Any = yaml.load(path)
        for stage in stages:
            lock["stages"].pop(stage, None)
        yaml.dump(lock, path)


def strike(project: Path, kill: Kill, measured: Measured, said: list[str]) -> dict[str, Any] | None:
    """Run `dvc repro` and kill it: what was struck and what outlived it; None if the run ended before.

    What DVC says of an earlier kill goes into `said`. Raises RuntimeError for a failure that no kill explains.
    """
    note, lock, figures = project.parent / "note", project / "dvc.lock", measured[kill.stage]
    armed = {"KILL_STAGE": kill.stage, "KILL_POINT": kill.point, "KILL_NOTE": str(note), "SHELL": kill.shell}
    if kill.point != "time":
        at = 1 + int(kill.at * figures[kill.point])
        armed |= {"KILL_AT": str(at), "KILL_AFTER": str(kill.after), "KILL_WHOM": kill.whom}
    before = probes(project)
    while True:
        note.unlink(missing_ok=True)
        with tempfile.TemporaryFile("w+") as output:
            process = repro(project, output, **armed)
            struck = kill_at_a_time(process, kill, figures["seconds"]) if kill.point == "time" else ""
            process.wait()
            outlived = outliving(process.pid)
            output.seek(0)
            text = output.read()
        if note.exists():
            struck = note.read_text()
        if process.returncode == 0 or (note.exists() and not struck):
            return None
        of_stage = re.search(
            rf"failed to reproduce '{kill.stage}': .*, exited with -9", text
        )  # SIGKILL, as DVC says it
        if struck and (of_stage if kill.whom == "stage" else process.returncode == -signal.SIGKILL):
            if kill.point == "dvc.lock":
                struck += f", {lock.stat().st_size if lock.exists() else 0} bytes of it left"
            return {"struck": struck, "outlived": outlived, "left": sorted(probes(project) - before)}
        said.append(take_way_out(project, text))


def probes(project: Path) -> set[str]:
    """The files with which DVC tests links and which a kill has left beside outputs."""
    found = (path.relative_to(project) for path in project.rglob(".*.tmp") if PROBE.fullmatch(path.name))
    return {str(path) for path in found if path.parts[0] != ".dvc"}


def finish(project: Path) -> list[str]:
    """Run `dvc repro` until all is done, with the documented remedies; returns what DVC said at each of them."""
    said: list[str] = []
    for _ in range(TRIES):
        with tempfile.TemporaryFile("w+") as output:
            if repro(project, output).wait() == 0:
                return said
            output.seek(0)
            said.append(take_way_out(project, output.read()))
    raise RuntimeError(f"not done after {TRIES} tries: {said}")


def results(project: Path) -> dict[str, str]:
    """The sha256 of every file that the stages write, except times and memory."""
    files = (path for folder in ("data", "models", "metrics") for path in sorted((project / folder).rglob("*")))
    return {
        str(path.relative_to(project)): sha256(path)
        for path in files
        if path.is_file()
        and not path.name.endswith(VOLATILE)
        and path.name not in {"train_memory.csv", ".gitignore"}
        and not PROBE.fullmatch(path.name)
    }


def left_over(project: Path) -> list[str]:
    """What must not be left: temporary files, checkpoints, and anything but torch's directory in TMPDIR or HOME."""
    empty = project.parent / "tmp" / f"torchinductor_{getpass.getuser()}"
    outside = [path for name in ("tmp", "home") for path in (project.parent / name).rglob("*") if path != empty]
    inside = [*project.rglob("*.partial"), *project.glob(".checkpoints/**/*")]
    return sorted(str(path.relative_to(project.parent)) for path in [*inside, *outside])


def prepare(directory: Path) -> Path:
    """A copy of the project on the micro profile, with an empty lock file and no cache, in a new directory."""
    project = directory / "project"
    shutil.copytree(ROOT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc" / "plots", project / ".dvc" / "plots")
    for path in ("dvc.yaml", "pyproject.toml", "constraints.txt", ".dvc/config", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / path, project / path)
    shutil.copyfile(ROOT / "profiles" / "micro.yaml", project / "params.yaml")
    (project / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n", encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


def measure(project: Path) -> Measured:
    """Run everything uninterrupted: the number of changes of files and the seconds of each stage, in DVC's order."""
    with tempfile.TemporaryDirectory() as counts, tempfile.TemporaryFile("w+") as output:
        status = repro(project, output, KILL_COUNT=counts).wait()
        output.seek(0)
        text = output.read()
        if status != 0:
            raise RuntimeError(text[-600:])
        notes = {path.name: json.loads(path.read_text()) for path in Path(counts).iterdir()}
    ran = re.findall(r"Running stage '(\w+)'", text)
    return {stage: notes[f"{stage}.stage.json"] | notes[f"{stage}.dvc.json"] for stage in ran}


def kill_all(
    project: Path, kills: list[Kill], measured: Measured, expected: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Strike in the order of the stages, then finish and compare; a row for each kill, with what is lost."""
    rows: list[dict[str, Any]] = []
    kills = sorted(kills, key=lambda kill: list(measured).index(kill.stage))
    for i, kill in enumerate(kills):
        said = rows[-1]["said"] if rows else []
        while not (found := strike(project, kill, measured, said)):  # the stage was quicker than when it was measured
            forget(project, *(later.stage for later in kills[i:]))
            kill = replace(kill, at=kill.at / 2, after=kill.after / 2)
        rows.append({**asdict(kill), **found, "said": []})
    try:
        rows[-1]["said"] = finish(project)
        found = results(project)
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        differ += left_over(project)
    except RuntimeError as error:
        differ = [str(error)]
    for row in rows:
        yield row | {"survived": not differ and not row["outlived"], "differ": differ}


def run_kills(number: int, seed: int) -> list[dict[str, Any]]:
    """All kills, three to a stage and run, each run in a new project; raises if one misses its moment."""
    chosen, rows = plan(number, seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        whole = prepare(Path(temporary, "whole"))
        measured = measure(whole)
        expected = results(whole)
        share = 3 * len(STAGES)
        for start in range(0, number, share):
            project = prepare(Path(temporary, f"killed{start}"))
            for row in kill_all(project, chosen[start : start + share], measured, expected):
                rows.append(row)
                print(json.dumps(row), flush=True)
            shutil.rmtree(project.parent)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of moment and victim: kills, those survived, and what DVC said first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((VICTIMS[row["whom"]], POINTS[row["point"]]), []).append(row)
    lines = [f"{'SIGKILL of':18} {'':30} {'kills':>5} {'survived':>8}  DVC then said"]
    for (whom, point), tries in sorted(groups.items()):
        said = next((said for row in tries for said in row["said"]), "")
        survived = sum(row["survived"] for row in tries)
        lines.append(f"{whom:18} {f'{point} a stage':30} {len(tries):5} {survived:8}  {said}".rstrip())
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=90)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rows = run_kills(options.kills, options.seed)
    survived = sum(row["survived"] for row in rows)
    lost = "".join(f"lost: {json.dumps(row)}\n" for row in rows if not row["survived"])
    command = f"python -m benchmarks.faults --kills {options.kills} --seed {options.seed}"
    figures: Figures = {"faults.kills": (len(rows), ""), "faults.kills_survived": (survived, "")}
    record(figures, command, LOGS / "faults.log", text=table(rows) + lost)
    sys.exit(survived < len(rows))


if __name__ == "__main__":
    main()
