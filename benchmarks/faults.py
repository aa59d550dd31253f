"""Kill the micro profile's run at seeded moments, then try everything else in the table of faults, and count.

`python -m benchmarks.faults` runs `dvc repro` with SIGKILLs in every stage, and in DVC where it writes what a stage
left, until all is done, and compares what it ends with to an uninterrupted run's in another directory. Two thirds of
the kills fall on a write or rename. Then it runs the tests of the other faults with many more cases, and records all.
"""

import argparse
import getpass
import hashlib
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

from benchmarks.record import FAULTS, HERE, record

ROOT = HERE.parent
LOG = HERE / "logs" / "faults.log"
STAGES = ("download", "base", "format", "train", "merge", "quantize", "evaluate", "reference", "baseline", "report")
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
SURVIVED = {"bad_inputs": "refused_cleanly", "inputs_accepted": "rightly"}  # the word for it, of a kind of fault
PROBE = re.compile(r"\.[\w-]{22}\.tmp")  # DVC tries out with it which links the disk has; nothing ever reads it
WAYS_OUT = {  # what DVC says of a file that its kill left cut or behind, and the way out that the documentation has
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


def environment(project: Path, **more: str) -> dict[str, str]:
    """This process's, but its own interpreter is python3, the hook that kills is there, and TMPDIR and HOME are new."""
    for name in ("tmp", "home"):
        (project.parent / name).mkdir(exist_ok=True)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HERE / "kill"),
        "TMPDIR": str(project.parent / "tmp"),
        "HOME": str(project.parent / "home"),
        **more,
    }


def repro(project: Path, output: Any, **more: str) -> subprocess.Popen[str]:
    """`dvc repro` without the run cache, in a session of its own; into a file, as a pipe stays open with a stage."""
    command = [sys.executable, "-m", "dvc", "repro", "--no-run-cache"]
    given = environment(project, **more)
    return subprocess.Popen(command, cwd=project, env=given, stdout=output, stderr=output, start_new_session=True)


def running(process: subprocess.Popen[str], stage: str) -> psutil.Process | None:
    """The process of that stage below `process`, once it is there."""
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            if f"pipeline.{stage}" in child.cmdline():
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
    """Do what the documentation tells of what `dvc repro` said, and return both; raises RuntimeError if nothing."""
    for line in output.splitlines():
        for pattern, command in WAYS_OUT.items():
            if re.search(pattern, line):
                subprocess.run(command, shell=True, cwd=project, check=True)
                return f"{line.strip().replace(f'{project}/', '')[:90]} (`{command}`)"
    raise RuntimeError(f"`dvc repro` failed, and no kill was why: {output[-600:]}")


def forget(project: Path, *stages: str) -> None:
    """Let DVC take the stages for not yet run."""
    path, yaml = project / "dvc.lock", YAML()
    if path.exists():
        lock: Any = yaml.load(path)
        for stage in stages:
            lock["stages"].pop(stage, None)
        yaml.dump(lock, path)


def strike(project: Path, kill: Kill, measured: Measured, said: list[str]) -> dict[str, Any] | None:
    """Run `dvc repro` and kill as told: what was struck and what outlived it; None if the run was over before.

    What DVC says of an earlier kill goes into `said`. A run that fails, and nothing shows that a kill was why, raises
    RuntimeError.
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
        )  # SIGKILL, in DVC's words
        if struck and (of_stage if kill.whom == "stage" else process.returncode == -signal.SIGKILL):
            if kill.point == "dvc.lock":
                struck += f", {lock.stat().st_size if lock.exists() else 0} bytes of it left"
            return {"struck": struck, "outlived": outlived, "left": sorted(probes(project) - before)}
        said.append(take_way_out(project, text))


def probes(project: Path) -> set[str]:
    """The files beside the outputs with which DVC tried out links, and which a kill has left there."""
    found = (path.relative_to(project) for path in project.rglob(".*.tmp") if PROBE.fullmatch(path.name))
    return {str(path) for path in found if path.parts[0] != ".dvc"}


def finish(project: Path) -> list[str]:
    """`dvc repro` until it is done, by the ways out that the documentation has; what DVC said at each that it took."""
    said: list[str] = []
    for _ in range(TRIES):
        with tempfile.TemporaryFile("w+") as output:
            if repro(project, output).wait() == 0:
                return said
            output.seek(0)
            said.append(take_way_out(project, output.read()))
    raise RuntimeError(f"not done after {TRIES} tries: {said}")


def results(project: Path) -> dict[str, str]:
    """The sha256 of all that the stages leave, but for seconds and memory."""
    files = (path for folder in ("data", "models", "metrics") for path in sorted((project / folder).rglob("*")))
    return {
        str(path.relative_to(project)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
        and not path.name.endswith(VOLATILE)
        and path.name not in {"train_memory.csv", ".gitignore"}
        and not PROBE.fullmatch(path.name)
    }


def left_over(project: Path) -> list[str]:
    """What nothing may leave: temporary files, checkpoints, anything in TMPDIR or HOME but the one that torch makes."""
    empty = project.parent / "tmp" / f"torchinductor_{getpass.getuser()}"
    outside = [path for name in ("tmp", "home") for path in (project.parent / name).rglob("*") if path != empty]
    inside = [*project.rglob("*.partial"), *project.glob(".checkpoints/**/*")]
    return sorted(str(path.relative_to(project.parent)) for path in [*inside, *outside])


def prepare(directory: Path) -> Path:
    """A copy of the project on the micro profile, with no cache and nothing in its lock file, in a new directory."""
    project = directory / "project"
    shutil.copytree(ROOT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".dvc").mkdir()
    for path in ("dvc.yaml", "pyproject.toml", ".dvc/config", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / path, project / path)
    shutil.copyfile(ROOT / "profiles" / "micro.yaml", project / "params.yaml")
    (project / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n", encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


def measure(project: Path) -> Measured:
    """Run what is to be done, uninterrupted: the changes of files and the seconds of each stage, in DVC's order."""
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
    """Strike in the order of the stages, then finish and compare; a row a kill: what it was, whether all is well."""
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


def run_kills(number: int, seed: int, log: list[str]) -> list[dict[str, Any]]:
    """All kills, three to a stage and run, each run in a fresh project; raises if one did not fall where it should."""
    chosen, rows = plan(number, seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        whole = prepare(Path(temporary, "whole"))
        measured = measure(whole)
        log.append(f"changes of files and seconds: {json.dumps(measured)}")
        expected = results(whole)
        share = 3 * len(STAGES)
        for start in range(0, number, share):
            project = prepare(Path(temporary, f"killed{start}"))
            for row in kill_all(project, chosen[start : start + share], measured, expected):
                rows.append(row)
                log.append(json.dumps(row))
                print(log[-1], flush=True)
            shutil.rmtree(project.parent)
    return rows


TESTS = (
    *(f"tests/unit/test_{name}.py" for name in ("bad_inputs", "header", "download", "weights")),
    *(f"tests/stages/test_{name}.py" for name in ("disk", "offline", "resume")),
    "tests/stages/test_faults.py::test_a_stale_lock_of_dvc_and_the_way_out",
    "tests/stages/test_faults.py::test_a_dvc_lock_that_a_kill_left_cut_and_the_way_out",
    "tests/stages/test_faults.py::test_a_lock_of_git_that_dvc_left_and_the_way_out",
)


def run_tests(cases: int, log: list[str]) -> list[dict[str, Any]]:
    """Run the tests that count their tries (tests/conftest.py: tried), with so many generated cases; a row a try.

    Raises RuntimeError if a test fails, counted or not.
    """
    with tempfile.TemporaryDirectory() as temporary:
        tally = Path(temporary, "tally.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=10", "-m", "not gpu", *TESTS]
        given = os.environ | {"TALLY": str(tally), "BAD_INPUTS": str(cases)}
        done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
        log += [f"$ BAD_INPUTS={cases} {' '.join(['pytest', *command[3:]])}", *done.stdout.splitlines()[-40:]]
        if done.returncode != 0:
            raise RuntimeError("\n".join(log[-40:]))
        print(log[-1], flush=True)
        rows = [json.loads(line) for line in tally.read_text(encoding="utf-8").splitlines()]
    return [row | {"command": f"BAD_INPUTS={cases} pytest -m 'not gpu' {row['test']}"} for row in rows]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a fault: the number of its tries, of those survived, what the user saw first, and the command."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["fault"], row["command"]), []).append(row)
    return [
        {
            "fault": fault,
            "tried": len(tries),
            "survived": sum(row["survived"] for row in tries),
            # A sentence without the names of temporary directories, and short enough for a table.
            "seen": re.sub(rf"{tempfile.gettempdir()}/\S*/", "", tries[0]["seen"])[:160],
            "command": command,
        }
        for (_, fault, command), tries in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=90)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cases", type=int, default=200, help="generated cases of each kind of bad input")
    options = parser.parse_args()
    log: list[str] = []
    command = f"python -m benchmarks.faults --kills {options.kills} --seed {options.seed} --cases {options.cases}"
    try:
        kills = run_kills(options.kills, options.seed, log)
        tests = run_tests(options.cases, log)
    finally:
        LOG.write_text("\n".join(log) + "\n", encoding="utf-8")
    rows: list[dict[str, Any]] = []
    # A row of the table shows what its first try saw: those that saw anything come first.
    for kill in sorted(kills, key=lambda kill: not (kill["said"] or kill["left"])):
        fault = f"SIGKILL of {VICTIMS[kill['whom']]} {POINTS[kill['point']]} {kill['stage']}"
        left = ["DVC leaves a hidden .tmp file beside an output"] if kill["left"] else []
        seen = "; ".join([*kill["said"], *left, "the next `dvc repro` ends the same"])
        rows.append({"kind": "kills", "fault": fault, "survived": kill["survived"], "seen": seen, "command": command})
    rows += tests
    FAULTS.write_text(json.dumps(summary(rows), indent=2) + "\n", encoding="utf-8")
    figures: dict[str, tuple[float, str]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        tries = [row for row in rows if row["kind"] == kind]
        figures[f"faults.{kind}"] = (len(tries), "")
        figures[f"faults.{kind}_{SURVIVED.get(kind, 'survived')}"] = (sum(row["survived"] for row in tries), "")
    record(figures, command, LOG)
    print(figures)


if __name__ == "__main__":
    main()
