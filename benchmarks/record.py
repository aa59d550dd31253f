"""Keep measured figures in benchmarks/results.json, and write the tables of README.md and docs/hardware.md from it.

    python -m benchmarks.record              write the tables, from results.json and the metrics of the runs
    python -m benchmarks.record --check      fail if a page of the last commit is not what this would write
    python -m benchmarks.record --add LOG    keep the figures in a log that another machine wrote

results.json has a figure under each key: value, unit and the run that measured it; `runs` has command, hardware,
versions, commit, date and log of each run. The check looks at the last commit alone, because a user's own run changes
metrics/ in the working tree, and that is no error.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, ROOT, hardware, versions
from benchmarks.tables import pages

MARK = "record: "  # before a run and its figures, as JSON, on a line of a log

Figures = dict[str, tuple[float, str]]  # key -> value and unit


def results() -> dict[str, Any]:
    """The contents of results.json."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"figures": {}, "runs": {}}


def write(kept: dict[str, Any]) -> None:
    """Write results.json: a figure a line, and a field of a run a line."""
    lines = ["{", ' "figures": {']
    lines.append(",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(kept["figures"].items())))
    lines += [" },", ' "runs": {']
    runs: list[str] = []
    for name, about in sorted(kept["runs"].items()):
        fields = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
        runs.append(f"  {json.dumps(name)}: {{\n{fields}\n  }}")
    RESULTS.write_text("\n".join([*lines, ",\n".join(runs), " }", "}"]) + "\n", encoding="utf-8")


def git(*arguments: str) -> str | None:
    """The output of a git command in the project; None if it fails or git is not installed."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def record(figures: Figures, command: str, log: Path, elsewhere: dict[str, Any] | None = None, text: str = "") -> None:
    """Keep the figures of one run, which is named as its log, in place of those that it had before.

    Writes `text`, or else the figures, to the log, and prints it with a line for `--add`. What another machine measured
    has `elsewhere`, which replaces what is said of this machine, and its log stays as it is.
    """
    about = {
        "command": command,
        "hardware": hardware(),
        "versions": versions(),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown").strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "log": str(log.relative_to(ROOT)),
        **(elsewhere or {}),
    }
    if not elsewhere:
        text = text or "\n".join(f"{key}: {value} {unit}".strip() for key, (value, unit) in figures.items())
        log.write_text(f"$ {command}\n{text.strip()}\n", encoding="utf-8")
        print(f"{text.strip()}\n{MARK}{json.dumps({'figures': figures, 'about': about})}", flush=True)
    kept, run = results(), log.stem
    kept["figures"] = {key: row for key, row in kept["figures"].items() if row["run"] != run}
    kept["figures"] |= {key: {"value": value, "unit": unit, "run": run} for key, (value, unit) in figures.items()}
    kept["runs"][run] = about
    used = {row["run"] for row in kept["figures"].values()}
    kept["runs"] = {name: about for name, about in kept["runs"].items() if name in used}
    write(kept)


def add(log: Path, changes: dict[str, str]) -> None:
    """Record the runs in a log of another machine, with `changes` of what it says of itself."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith(MARK)]
    for found in map(json.loads, (line.removeprefix(MARK) for line in lines)):
        about = found["about"] | changes
        record(found["figures"], about["command"], ROOT / about["log"], about)


def committed(path: Path) -> str | None:
    """The text of a file at the last commit, None if it is not there; the working tree's without a repository."""
    if git("rev-parse", "HEAD") is None:
        return working(path)
    return git("show", f"HEAD:./{path.relative_to(ROOT)}")


def working(path: Path) -> str | None:
    """The text of a file of the working tree; None if it is not there."""
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is stale")
    parser.add_argument("--add", type=Path, metavar="LOG", help="a log with lines that begin with 'record: '")
    for name in ("commit", "hardware"):
        parser.add_argument(f"--{name}", help="with --add: replaces what the log says")
    options = parser.parse_args()
    if options.add:
        add(options.add, {name: getattr(options, name) for name in ("commit", "hardware") if getattr(options, name)})
        return
    for path, (found, text) in pages(committed if options.check else working).items():
        if options.check and found != text:
            sys.exit(f"{path.name} differs from what results.json and metrics/ say; run `python -m benchmarks.record`")
        if not options.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
