"""Time what a newcomer and a contributor do, from a fresh clone of this commit with empty caches.

`python -m benchmarks.repro` runs `make setup`, `dvc repro` of the default by stage and once more, `make test` and
`make check`; then metrics, predictions and dvc.lock are changed as on a machine that rounds differently, and both run
again.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import LOGS, ROOT
from benchmarks.record import Figures, record

PYTHON = os.environ.get("PYTHON", str(Path(sys.base_prefix, "bin", "python3")))
Lines = list[tuple[float, str]]  # seconds since the command's start, and what it printed


def timed(command: list[str], cwd: Path, caches: Path, log: list[str]) -> Lines:
    """Run a command with a bare environment and end this process if it fails; the last line is empty."""
    print(f"$ {' '.join(command)}", flush=True)
    # The real home says where pip finds packages; what it has cached would make set-up look faster than it is.
    env = {"HOME": os.environ["HOME"], "XDG_CACHE_HOME": str(caches), "PATH": os.defpath, "PYTHON": PYTHON}
    start = time.monotonic()
    lines: Lines = []
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append((time.monotonic() - start, line.rstrip()))
    seconds = time.monotonic() - start
    log.append(f"{seconds:8.1f} s  {' '.join(command)}")
    print(log[-1], flush=True)
    if process.returncode != 0:
        sys.exit("\n".join([*(line for _, line in lines[-40:]), f"{' '.join(command)} failed"]))
    return [*lines, (seconds, "")]


def stage_seconds(lines: Lines) -> dict[str, float]:
    """Wall seconds of each stage: from its 'Running stage' line to the next stage's, or to the end."""
    starts = [(at, found[1]) for at, line in lines if (found := re.match(r"Running stage '(\w+)'", line))]
    ends = [at for at, _ in starts[1:]] + [lines[-1][0]]
    return {name: round(end - at, 1) for (at, name), end in zip(starts, ends, strict=True)}


def perturbed(value: Any) -> Any:
    """The value with every float in it a little smaller, as if another machine had rounded."""
    if isinstance(value, dict):
        return {key: perturbed(item) for key, item in value.items()}
    return value * (1 - 1e-3) if isinstance(value, float) else value


def perturb(project: Path) -> None:
    """Change all metrics, the log-probabilities of all predictions, and the hashes of all results in dvc.lock."""
    for path in (project / "metrics").glob("*.json"):
        path.write_text(json.dumps(perturbed(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    for path in (project / "metrics" / "predictions").glob("*.csv"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"(-\d+\.\d{3})\d+", r"\g<1>999", text), encoding="utf-8")
    lock = project / "dvc.lock"
    text = lock.read_text(encoding="utf-8")
    results = r"(path: (?:metrics|models)/\S+\n\s+hash: md5\n\s+md5: )(\w+)"
    lock.write_text(re.sub(results, lambda found: found[1] + found[2][::-1], text), encoding="utf-8")


def lines_of(project: Path, folder: str) -> int:
    """The number of lines of the Python files in git under a folder."""
    listed = subprocess.run(["git", "ls-files", f"{folder}/*.py"], cwd=project, capture_output=True, check=True)
    return sum((project / name).read_bytes().count(b"\n") for name in listed.stdout.decode().split())


def result_figures(project: Path) -> Figures:
    """What the default run found."""
    compare = json.loads((project / "metrics" / "compare.json").read_text(encoding="utf-8"))
    figures: Figures = {
        f"tiny.{name}_accuracy": (round(compare[name]["accuracy"]["value"], 4), "")
        for name in ("base", "tuned", "tfidf")
    }
    if lost := compare["tuned_minus_merged"]:
        figures["tiny.q4_agreement"] = (round(1 - lost["changed"] / compare["questions"], 4), "of decisions at 16 bits")
    return figures


def main() -> None:
    log: list[str] = []
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        clone, caches = Path(temporary, "medical-reasoner"), Path(temporary, "caches")
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)

        def run(*command: str) -> Lines:
            return timed(list(command), clone, caches, log)

        seconds["setup"] = run("make", "setup")[-1][0]
        seconds["setup.noop"] = run("make", "setup")[-1][0]
        (clone / "dvc.lock").unlink(missing_ok=True)
        lines = run(".venv/bin/dvc", "repro")
        stages = stage_seconds(lines)
        log += [f"{value:8.1f} s    {stage}" for stage, value in stages.items()]
        seconds |= {"repro.tiny": lines[-1][0]} | {f"repro.tiny.{stage}": value for stage, value in stages.items()}
        seconds["repro.noop"] = run(".venv/bin/dvc", "repro")[-1][0]
        results = result_figures(clone)
        for when in ("", ".perturbed"):
            if when:
                perturb(clone)
                log.append("metrics, predictions and dvc.lock changed")
            seconds[f"tests.default{when}"] = run("make", "test")[-1][0]
            seconds[f"check{when}"] = run("make", "check")[-1][0]
        share = lines_of(clone, "tests") / lines_of(clone, "pipeline")
    figures: Figures = {f"{name}.wall_s": (round(value, 2), "s") for name, value in seconds.items()}
    figures["tests.lines_over_code"] = (round(share, 2), "lines of tests per line of pipeline")
    record(figures | results, "python -m benchmarks.repro", LOGS / "repro.log", text="\n".join(log))


if __name__ == "__main__":
    main()
