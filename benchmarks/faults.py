"""Kill the micro profile's stages at seeded moments, then try everything else in the table of faults, and count.

`python -m benchmarks.faults --kills 60 --seed 7` runs `dvc repro` with SIGKILLs in every stage until it is done, and
compares what it ends with to an uninterrupted run's in another directory; half of the kills fall on a write or rename.
Then it runs the tests of the other faults with many more cases, and records all of them.
"""

import argparse
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from benchmarks.record import FAULTS, HERE, record
from pipeline.stage import remove

ROOT = HERE.parent
LOG = HERE / "logs" / "faults.log"
STAGES = ("download", "base", "format", "train", "merge", "quantize", "evaluate", "reference", "baseline", "report")
VICTIMS = ("stage", "group", "dvc")
VICTIM_NAMES = {"stage": "the stage", "group": "DVC and the stage", "dvc": "DVC alone"}
VOLATILE = "_resources.json"  # seconds and memory: another every time
TRIES = 4  # runs of `dvc repro` that may fail after a kill, before it counts as lost


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: at the n-th change of a file, or after a share of the stage's time; `at` is that share in both."""

    stage: str
    whom: str
    point: str  # write or time
    at: float  # 0 to 1
    after: float = 0.0  # seconds after the write began


def plan(kills: int, seed: int, stages: tuple[str, ...] = STAGES) -> list[Kill]:
    """Seeded kills, as many in each stage as in another; every other one aimed at a write or rename."""
    rng = random.Random(seed)
    chosen: list[Kill] = []
    for i in range(kills):
        point = "write" if i % 2 else "time"
        after = rng.choice([0.0, 0.0, 0.002]) if point == "write" else 0.0
        at = rng.random() * (1.0 if point == "write" else 0.8)  # a stage can be quicker than it was when measured
        chosen.append(Kill(stages[i // 2 % len(stages)], rng.choice(VICTIMS), point, at, after))
    return chosen


def environment(**more: str) -> dict[str, str]:
    """This process's, with its own interpreter as python3, and the hook that kills on PYTHONPATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(HERE / "kill")} | more


def repro(project: Path, *, stderr: Any = subprocess.DEVNULL, **more: str) -> subprocess.Popen[str]:
    """`dvc repro` without the run cache, leading a process group of its own."""
    command = [sys.executable, "-m", "dvc", "repro", "--no-run-cache"]
    return subprocess.Popen(
        command,
        cwd=project,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def running(process: subprocess.Popen[str], stage: str) -> psutil.Process | None:
    """The process of that stage below `process`, once it is there."""
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            if f"pipeline.{stage}" in child.cmdline():
                return child
    except psutil.Error:
        pass
    return None


def forget(project: Path, *stages: str) -> None:
    """Let DVC take the stages for not yet run."""
    path, yaml = project / "dvc.lock", YAML()
    if path.exists():
        lock: Any = yaml.load(path)
        for stage in stages:
            lock["stages"].pop(stage, None)
        yaml.dump(lock, path)


def strike(project: Path, kill: Kill, changes: dict[str, int], seconds: dict[str, float]) -> bool:
    """Run `dvc repro` and kill as told; whether the kill fell in the stage."""
    armed: dict[str, str] = {}
    if kill.point == "write":
        at = 1 + int(kill.at * changes[kill.stage])
        armed = {"KILL_AT": str(at), "KILL_AFTER": str(kill.after), "KILL_WHOM": kill.whom, "KILL_STAGE": kill.stage}
    with repro(project, **armed) as process:
        child = None
        while process.poll() is None and (child := child or running(process, kill.stage)) is None:
            time.sleep(0.002)
        if child and kill.point == "time":
            time.sleep(kill.at * seconds[kill.stage])
            try:
                match kill.whom:
                    case "group":
                        os.killpg(process.pid, signal.SIGKILL)
                    case "dvc":
                        process.kill()
                    case _:
                        child.kill()
            except (psutil.Error, ProcessLookupError):
                pass
        process.communicate()
    if child:
        psutil.wait_procs([child], timeout=60)
        if child.is_running():
            raise RuntimeError(f"{kill}: the stage outlived its parent")
    return process.returncode != 0


def finish(project: Path) -> list[str]:
    """`dvc repro` until it is done; what each try that failed said last. Raises RuntimeError if none succeeds."""
    said: list[str] = []
    for _ in range(TRIES):
        process = repro(project, stderr=subprocess.STDOUT)
        output, _ = process.communicate()
        if process.returncode == 0:
            return said
        said.append(output.strip().splitlines()[-1])
    raise RuntimeError(f"not done after {TRIES} tries: {said}")


def results(project: Path) -> dict[str, str]:
    """The sha256 of all that the stages leave but seconds and memory; temporary files would be among it."""
    return {
        str(path.relative_to(project)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("data", "models", "metrics", ".checkpoints")
        for path in sorted((project / folder).rglob("*"))
        if path.is_file() and not path.name.endswith(VOLATILE) and path.name not in {"train_memory.csv", ".gitignore"}
    }


def prepare(directory: Path, name: str) -> Path:
    """A copy of the project on the micro profile, with no cache and no lock file."""
    project = directory / name
    shutil.copytree(ROOT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".dvc").mkdir()
    for path in ("dvc.yaml", "pyproject.toml", ".dvc/config", ".dvcignore"):
        shutil.copyfile(ROOT / path, project / path)
    shutil.copyfile(ROOT / "profiles" / "micro.yaml", project / "params.yaml")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


def measure(project: Path, stages: tuple[str, ...] = STAGES) -> tuple[dict[str, int], dict[str, float]]:
    """Run each stage by itself, uninterrupted: the number of its changes of files, and its seconds."""
    changes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    described: dict[str, Any] = YAML(typ="safe").load(project / "dvc.yaml")["stages"]
    for stage in stages:
        outputs = (out for kind in ("outs", "metrics", "plots") for out in described[stage].get(kind, []))
        for out in outputs:  # as DVC does
            remove(project / (out if isinstance(out, str) else next(iter(out))))
        start = time.monotonic()
        counted = environment(KILL_STAGE=stage, KILL_COUNT=str(project / "count"))
        subprocess.run(
            described[stage]["cmd"], shell=True, cwd=project, env=counted, check=True, stderr=subprocess.DEVNULL
        )
        changes[stage] = int((project / "count").read_text())
        seconds[stage] = time.monotonic() - start
    return changes, seconds


def kill_all(
    project: Path, kills: list[Kill], changes: dict[str, int], seconds: dict[str, float], expected: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Strike in the order of the stages, then finish and compare; a row a kill: what it was, whether all is well."""
    rows: list[dict[str, Any]] = []
    for i, kill in enumerate(kills):
        while not strike(project, kill, changes, seconds):  # the stage was quicker than when it was measured
            forget(project, *(later.stage for later in kills[i:]))
            kill = replace(kill, at=kill.at / 2)
        rows.append(asdict(kill))
    said: list[str] = []
    try:
        said = finish(project)
        found = results(project)
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    except RuntimeError as error:
        differ = [str(error)]
    for row in rows:
        yield row | {"survived": not differ, "differ": differ, "said": said}


def run_kills(number: int, seed: int, log: list[str]) -> list[dict[str, Any]]:
    """All kills, two to a stage and run, each run in a fresh project; raises if one did not fall in its stage."""
    chosen, rows = plan(number, seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        whole = prepare(directory, "whole")
        changes, seconds = measure(whole)
        log.append(f"changes of files: {changes}; seconds: { {k: round(v, 1) for k, v in seconds.items()} }")
        expected = results(whole)
        share = 2 * len(STAGES)
        for start in range(0, number, share):
            project = prepare(directory, f"killed{start}")
            for row in kill_all(project, chosen[start : start + share], changes, seconds, expected):
                rows.append(row)
                log.append(json.dumps(row))
                print(log[-1], flush=True)
            shutil.rmtree(project)
    return rows


TESTS = tuple(f"tests/unit/test_{name}.py" for name in ("bad_inputs", "header", "download", "weights"))
SLOW_TESTS = ("tests/stages/test_disk.py", "tests/stages/test_offline.py", "tests/stages/test_resume.py")


def run_tests(paths: tuple[str, ...], cases: int, log: list[str]) -> list[dict[str, Any]]:
    """Run tests that count their tries (tests/conftest.py: tried) with `cases` generated cases each; a row a try."""
    with tempfile.TemporaryDirectory() as temporary:
        tally = Path(temporary, "tally.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "not gpu", *paths]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"TALLY": str(tally), "BAD_INPUTS": str(cases)},
            capture_output=True,
            text=True,
            check=False,
        )
        log += [f"$ {' '.join(['pytest', *command[3:]])}", *done.stdout.splitlines()[-30:]]
        print(log[-1], flush=True)
        if not tally.exists():  # the tests of these files count nothing
            return []
        return [json.loads(line) for line in tally.read_text(encoding="utf-8").splitlines()]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a fault: the number of its tries, of those survived, what the user saw last, and the command."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["fault"], row["command"]), []).append(row)
    return [
        {
            "fault": fault,
            "tried": len(tries),
            "survived": sum(row["survived"] for row in tries),
            # A sentence without the names of temporary directories, and short enough for a table.
            "seen": re.sub(r"/tmp/(\S*/|\S+)", "", next((row["seen"] for row in tries if row["seen"]), ""))[:160],
            "command": command,
        }
        for (fault, command), tries in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cases", type=int, default=200, help="generated cases of each kind of bad input")
    options = parser.parse_args()
    log: list[str] = []
    command = f"python -m benchmarks.faults --kills {options.kills} --seed {options.seed} --cases {options.cases}"
    rows: list[dict[str, Any]] = []
    for kill in run_kills(options.kills, options.seed, log):
        fault = f"SIGKILL of {VICTIM_NAMES[kill['whom']]} in {kill['stage']}, aimed at a {kill['point']}"
        seen = (kill["said"] or ["the next `dvc repro` ends the same"])[-1]
        rows.append({"kind": "kills", "fault": fault, "survived": kill["survived"], "seen": seen, "command": command})
    for paths in (TESTS, SLOW_TESTS):
        for path in paths:
            found = run_tests((path,), options.cases, log)
            rows += [row | {"command": f"BAD_INPUTS={options.cases} pytest -m 'not gpu' {path}"} for row in found]
    LOG.write_text("\n".join(log) + "\n", encoding="utf-8")
    FAULTS.write_text(json.dumps(summary(rows), indent=2) + "\n", encoding="utf-8")
    figures: dict[str, tuple[float, str]] = {}
    for kind, word in (("kills", "survived"), ("bad_inputs", "refused_cleanly"), ("downloads", "survived")):
        tries = [row for row in rows if row["kind"] == kind]
        figures[f"faults.{kind}"] = (len(tries), "")
        figures[f"faults.{kind}_{word}"] = (sum(row["survived"] for row in tries), "")
    record(figures, command, LOG)
    print(figures)


if __name__ == "__main__":
    main()
