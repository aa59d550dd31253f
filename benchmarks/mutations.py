"""Break the code on purpose, one place at a time, and see that the tests of each promise fail.

`python -m benchmarks.mutations` copies the project, runs the tests of mutations.txt on the code as it is, then once for
every broken line. A line is caught when a test fails by an assertion, or because the pipeline refuses what it has to
accept; any other failure, such as an import that fails, is an error of the table. `--only NAME` takes some promises;
`--check` runs nothing and lists the rows whose files, tests or texts are not there.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import HERE, LOGS, ROOT, environment
from benchmarks.record import Figures, record

TABLE, LOG = HERE / "mutations.txt", LOGS / "mutations.log"


class Mutation(NamedTuple):
    """A text of a file, what it becomes, and the tests of a promise that must fail then."""

    promise: str
    tests: list[str]
    path: str
    old: str
    new: str


def table() -> list[Mutation]:
    """The rows of mutations.txt."""
    rows: list[Mutation] = []
    promise, tests = "", list[str]()
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if not line.startswith(" "):
            promise, tests = line.split(":")[0], []
        elif line.strip().startswith("tests/"):
            ended = bool(rows) and rows[-1].tests is tests  # the tests of what follows, not more of those above
            tests = [line.strip()] if ended else [*tests, line.strip()]
        else:
            name, change = line.strip().split(": ", 1)
            old, new = (text.replace("¶", "\n") for text in change.split(" => "))
            rows.append(Mutation(promise, tests, name if "." in name else f"pipeline/{name}.py", old, new))
    return rows


def exists(directory: Path, test: str) -> bool:
    """Whether the file of a pytest id is there, and in it each class and function that the id names."""
    name, *parts = test.partition("[")[0].split("::")
    path = directory / name
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return path.is_file() and all(re.search(rf"\b(class|def) {part}\b", text) for part in parts)


def problem(directory: Path, row: Mutation) -> str:
    """Why a row cannot be tried in a copy of the project; "" if it can."""
    missing = [test for test in row.tests if not exists(directory, test)]
    if missing or not row.tests or not (directory / row.path).is_file():
        return f"there is no {missing[0] if missing else row.path}"
    count = (directory / row.path).read_text(encoding="utf-8").count(row.old)
    return "" if count == 1 and row.old != row.new else f"the text occurs {count} times"


def copy_project(directory: Path) -> None:
    """Copy and commit what git would hold of the working tree: some tests clone it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)  # the mode too
    for command in (["init"], ["add", "--force", "--all"], ["commit", "--message", "whole"]):
        git(directory, *command)
    (directory / ".venv").symlink_to(sys.prefix)


def git(directory: Path, command: str, *options: str) -> None:
    """Run a git command by an invented author."""
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *author, command, *options], cwd=directory, check=True, stdout=subprocess.DEVNULL)


def pytest(directory: Path, tests: list[str], base: str, **more: str) -> tuple[int, str]:
    """The exit status of the tests, and what pytest's summary says of the first that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--basetemp={directory}-{base}", *dict.fromkeys(tests)],
        cwd=directory,
        env=environment(COLUMNS="1000", PYTHONDONTWRITEBYTECODE="1", **more),
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0] if failed else done.stdout[-300:] + done.stderr[-300:]


def outcome(directory: Path, row: Mutation, **more: str) -> tuple[str, str]:
    """`caught`, `survived` or `error`, and what pytest says of it."""
    if why := problem(directory, row):
        return "error", why
    path = directory / row.path
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(row.old, row.new), encoding="utf-8")
    try:
        git(directory, "commit", "--all", "--message", "broken")
        status, said = pytest(directory, row.tests, "one", **more)
    finally:
        path.write_text(text, encoding="utf-8")
    if status == 0:
        return "survived", ""
    by_assertion = re.search(r" - (assert|AssertionError|Failed|pipeline\.core\.errors\.Fail)", said)
    return "caught" if status == 1 and by_assertion else "error", said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="promises of the table")
    parser.add_argument(
        "--check", action="store_true", help="run no test: only look for files, tests and texts of the table"
    )
    options = parser.parse_args()
    rows = [row for row in table() if not options.only or row.promise in options.only]
    if options.check:
        sys.exit("\n".join(f"{row.path}: {row.old!r}: {why}" for row in rows if (why := problem(ROOT, row))) or 0)
    counts = {"caught": 0, "survived": 0, "error": 0}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, "project")
        directory.mkdir()
        copy_project(directory)
        status, said = pytest(directory, [test for row in rows for test in row.tests], "whole")
        if status:
            sys.exit(f"the tests fail before anything is broken: {said}")
        print(f"the tests pass on the code as it is ({time.perf_counter() - start:.0f} s)", flush=True)
        micro = Path(f"{directory}-whole", "micro")  # a finished run, so that each broken line need not repeat it
        ready = {"MICRO": str(micro)} if micro.is_dir() else {}
        lines: list[str] = []
        for row in rows:
            found, said = outcome(directory, row, **ready)
            counts[found] += 1
            lines.append(f"{found:8}  {row.promise:10}  {row.path}: {row.old!r} => {row.new!r}")
            print(lines[-1], said.replace(temporary, "")[:160] if found == "error" else "", flush=True)
    promises = len({row.promise for row in rows})
    lines.append(f"{promises} promises, {len(rows)} broken lines: {counts} ({time.perf_counter() - start:.0f} s)")
    print(lines[-1])
    if not options.only and not counts["error"]:
        figures: Figures = {
            "tests.mutations": (len(rows), ""),
            "tests.mutations_caught": (counts["caught"], ""),
        }
        record(figures, "python -m benchmarks.mutations", LOG, text="\n".join(lines))
    sys.exit(counts["caught"] < len(rows))


if __name__ == "__main__":
    main()
