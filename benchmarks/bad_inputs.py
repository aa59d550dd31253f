"""Bad input of every kind through the commands that people run: does each end in a clean refusal?

`python -m benchmarks.bad_inputs` runs the micro profile up to `format`, then a stage or command for each input, in a
forked child of this process, which has the libraries loaded. A refusal is clean if the exit status is 1, the last line
names the command and says what is wrong, there is no traceback, and no file of the project or of TMPDIR was written,
changed or removed. Parameters are drawn from the sections' own models; bases,
question files and tables are altered in the ways that the tests name, and at random. What is valid in spite of a random
change is not counted.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.faults import prepare
from benchmarks.machine import LOGS
from benchmarks.record import Figures, record
from benchmarks.tables import STAGES as ALL
from pipeline.commands.cli import run_command
from pipeline.core.dataset import read_dataset
from pipeline.core.errors import Fail
from pipeline.core.outputs import remove
from pipeline.core.params import load_params
from pipeline.run import run_stage
from tests.bases import add_special, sentencepiece, write_model
from tests.conftest import stages
from tests.stages.test_bases import LATE
from tests.unit.test_bad_inputs import MICRO as MICRO_TEXT
from tests.unit.test_bad_inputs import RECORDS, TRUTH, changed, damaged, yaml_texts
from tests.unit.test_examine import REFUSED
from tests.unit.test_import_table import LINE, frame, rows
from tests.unit.test_params import MICRO
from tests.unit.test_sections import SECTIONS, draws, lenient, load

Files = dict[str, bytes]
SECONDS = 600  # a command that takes longer is not refused cleanly
KINDS = ("parameters", "questions", "tables", "bases", "conversion")


class Case(NamedTuple):
    """One input and the command that reads it, both relative to the directory that holds the project."""

    kind: str
    name: str
    command: list[str]  # a stage or command, and its arguments
    files: Files
    must_fail: bool  # known to be bad; otherwise it may be valid in spite of a change
    words: str = ""  # of the refusal
    model: Callable[[Path], Any] | None = None  # makes a base there


def sample(strategy: st.SearchStrategy[Any], number: int, start: int) -> list[Any]:
    """`number` values, the same for the same seed."""
    found: list[Any] = []

    @seed(start)
    @settings(max_examples=number, phases=[Phase.generate], **lenient)
    @given(strategy)
    def keep(value: Any) -> None:
        found.append(value)

    keep()
    return found


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place in it changed."""
    return changed(draw, value)


def as_yaml(values: dict[str, Any]) -> bytes:
    """JSON, which is YAML, with YAML's words for numbers that JSON lacks."""
    text = json.dumps(values)
    for ours, theirs in (("NaN", ".nan"), ("-Infinity", "-.inf"), ("Infinity", ".inf")):
        text = text.replace(f": {ours}", f": {theirs}")
    return text.encode()


def refuses(action: Callable[[], Any]) -> bool:
    """Whether the pipeline's own check refuses."""
    try:
        action()
    except Fail:
        return True
    return False


def parameters(number: int, start: int, stage: Callable[..., list[str]]) -> Iterator[Case]:
    """Refused draws of every section, and of the whole file's text."""
    for name in SECTIONS:
        section = draws(name) | altered(MICRO[name]).filter(lambda values: isinstance(values, dict))
        refused = section.filter(lambda values, name=name: isinstance(load(name, values), str))
        for values in sample(refused, number, start):
            files = {"project/params.yaml": as_yaml(MICRO | {name: values})}
            yield Case("parameters", f"{name} {values}", stage(name), files, True, "params.yaml")
    with tempfile.TemporaryDirectory() as directory, chdir(directory):
        for body in sample(damaged(MICRO_TEXT) | yaml_texts(), 2 * number, start):
            Path("params.yaml").write_bytes(body)
            for name, model in SECTIONS.items():
                if refuses(partial(load_params, name, model)):
                    files = {"project/params.yaml": body}
                    yield Case("params.yaml as text", str(body), stage(name), files, True, "params.yaml")
                    break


def questions(number: int, start: int, stage: Callable[..., list[str]]) -> Iterator[Case]:
    """Altered question files, for `check-data` and for `format`."""
    both = st.tuples(altered(RECORDS), st.just(TRUTH)) | st.tuples(st.just(RECORDS), altered(TRUTH))
    pairs = [tuple(json.dumps(value).encode() for value in pair) for pair in sample(both, 2 * number, start)]
    pairs += [(body, json.dumps(TRUTH).encode()) for body in sample(damaged(json.dumps(RECORDS)), number, start)]
    for i, bodies in enumerate(pairs):
        files = {
            f"raw/{name}": body for name, body in zip(("ori_pqal.json", "test_ground_truth.json"), bodies, strict=True)
        }
        with tempfile.TemporaryDirectory() as directory:
            paths = [Path(directory, Path(name).name) for name in files]
            for path, body in zip(paths, bodies, strict=True):
                path.write_bytes(body)
            bad = refuses(partial(read_dataset, *paths, "records", "truth"))
        if bad:
            command = stage("format", raw="../raw") if i % 2 else ["check-data", *(f"../{name}" for name in files)]
            yield Case(f"question files, {command[0]}", str(i), command, files, True)


def tables(number: int, start: int) -> Iterator[Case]:
    """Tables for `import-table`: damaged text, and what people get wrong."""
    found = rows()
    text = frame(found).to_csv(index=False)
    with tempfile.TemporaryDirectory() as directory:
        frame(found).to_excel(f"{directory}/t.xlsx", index=False)
        sheet = Path(directory, "t.xlsx").read_bytes()
    wrong = [["1", "q", "a", "perhaps", "c"], ["", "q", "a", "yes", "c"], ["2", "", "a", "no", "c"], found[0]]
    named: dict[str, tuple[str, bytes, list[str]]] = {
        **{f"row {i}": ("t.csv", frame([*found, row]).to_csv(index=False).encode(), []) for i, row in enumerate(wrong)},
        "no rows": ("t.csv", LINE.encode(), []),
        "empty": ("t.csv", b"", []),
        "one question": ("t.csv", f"{LINE}1,q,a,yes,c\n".encode(), []),
        "too many fields": ("t.csv", f"{LINE}1,q,a,yes,c,x\n2,q,a,no,c\n".encode(), []),
        "no such column": ("t.csv", text.encode(), ["--question", "Frage"]),
        "no such group": ("t.csv", text.encode(), ["--group", "patient"]),
        "no such sheet": ("t.xlsx", sheet, ["--sheet", "x"]),
        "half a sheet": ("t.xlsx", sheet[: len(sheet) // 2], []),
        "text as a sheet": ("t.xlsx", text.encode(), []),
        "binary": ("t.csv", sheet, []),
        "no file": ("other.csv", b"", []),
        "other answers": ("t.csv", text.replace("yes", "ja").encode(), []),
    }
    for name, (file, body, options) in named.items():
        command = ["import-table", "../t.xlsx" if file == "t.xlsx" else "../t.csv", "--output", "../own"]
        yield Case("tables", name, [*command, *options], {file: body}, True)
    for body in sample(damaged(text), 2 * number, start):
        command = ["import-table", "../t.csv", "--output", "../own"]
        yield Case("tables", str(body)[-200:], command, {"t.csv": body}, False)


LOCAL = {"project/params.yaml": as_yaml(MICRO | {"base": {"source": "local", "path": "../model"}})}


def bases(stage: Callable[..., list[str]]) -> Iterator[Case]:
    """Local models that programs read differently, and paths that are none."""
    for kind, (model, changes, _) in REFUSED.items():
        files = {f"model/{name}": body for name, body in {**model, **changes}.items() if body is not None}
        yield Case("bases", kind, stage("base"), LOCAL | files, True)
    for path in ("~/model", "gone", "params.yaml", "models"):
        files = {"project/params.yaml": as_yaml(MICRO | {"base": {"source": "local", "path": path}})}
        yield Case("bases", path, stage("base"), files, True)


def conversions(number: int, start: int, stage: Callable[..., list[str]]) -> Iterator[Case]:
    """Local models that only the converter refuses, and with altered JSON files; these take the most time."""
    tokenizer, pieces = sentencepiece()
    make = partial(write_model, tokenizer=add_special(tokenizer), family="zephyr", pieces=pieces)

    def late(path: Path, change: Callable[[Path], None]) -> None:
        make(path)
        change(path)

    for change in LATE:
        yield Case("conversion", change.__name__, stage("base"), LOCAL, True, model=partial(late, change=change))
    with tempfile.TemporaryDirectory() as directory:
        whole = make(Path(directory))
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
            value = json.loads((whole / name).read_text())
            for i, other in enumerate(sample(altered(value), max(1, number // 4), start)):
                files = LOCAL | {f"model/{name}": json.dumps(other).encode()}
                yield Case("conversion, altered JSON", f"{name} {i}", stage("base"), files, False, model=make)


def state(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file, zeros of every directory; without git's and Python's own."""
    found = (path for path in directory.rglob("*") if ".git" not in path.parts and path.suffix != ".pyc")
    sizes = ((path, path.lstat()) for path in found)
    return {
        str(path.relative_to(directory)): (0, 0) if path.is_dir() else (about.st_size, about.st_mtime_ns)
        for path, about in sizes
    }


def start(name: str, arguments: list[str]) -> None:
    """What `python -m pipeline.run` and `python -m pipeline` do with a stage or command."""
    if name in ALL:
        run_stage(name, arguments)
    else:
        run_command(name, import_module(f"pipeline.commands.{name.replace('-', '_')}").main, arguments)


def call(directory: Path, command: list[str]) -> tuple[int | None, str]:
    """Exit status of a command in a child process, None if it takes too long, and what it wrote."""
    written = directory.parent / "written"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            output = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(directory / "project")
            tempfile.tempdir = None
            os.environ.update(TMPDIR=str(directory / "tmp"), HOME=str(directory / "home"), HF_HUB_OFFLINE="1")
            start(command[0], command[1:])
            status = 0
        except SystemExit as end:  # as Python itself ends
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                os.write(2, f"{end.code}\n".encode(errors="backslashreplace"))
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
        finally:
            os._exit(status)
    end = time.monotonic() + SECONDS
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, ""
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1]), written.read_text(errors="replace")


def run(case: Case, directory: Path) -> tuple[int | None, str]:
    """The exit status, None if it takes too long, and what was unclean about the refusal or ""."""
    if case.model:
        case.model(directory / "model")
    for name, body in case.files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(body)
    before = state(directory)
    status, said = call(directory, case.command)
    after = state(directory)
    last = (said.strip().splitlines() or [""])[-1]
    problems: list[str] = []
    if status != 1:
        problems.append(f"exit status {status}")
    if "Traceback" in said:
        problems.append("traceback")
    if not last.startswith(f"{case.command[0]}: ") or len(last.split()) < 5 or not last.isprintable():
        problems.append("no sentence")
    elif case.words not in last:
        problems.append(f"not about {case.words}")
    if written := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        problems.append(f"changed {', '.join(written[:5])}")
    return status, "; ".join([*problems, last[:300]] if problems else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=8, help="of each section; other kinds have a multiple of it")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    counts: dict[str, list[int]] = {}
    unclean: list[str] = []
    for name in ALL:
        import_module(f"pipeline.stages.{name}")  # a child has them then
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, "run")
        project = prepare(directory)
        commands = {name: stage["cmd"].partition("pipeline.run ")[2].split() for name, stage in stages(project).items()}
        for name in ("tmp", "home"):
            (directory / name).mkdir()

        def stage(name: str, raw: str = "data/raw") -> list[str]:
            return [raw if part == "data/raw" else part for part in commands[name]]

        for name in ("download", "base", "format"):
            status, said = call(directory, stage(name))
            if status != 0:
                sys.exit(said)
        drawn = (options.draws, options.seed)
        params = project / "params.yaml"
        whole = params.read_bytes()
        makers = {
            "parameters": parameters(*drawn, stage),
            "questions": questions(*drawn, stage),
            "tables": tables(*drawn),
            "bases": bases(stage),
            "conversion": conversions(*drawn, stage),
        }
        for case in chain(*(makers[kind] for kind in options.kinds)):
            if "raw/ori_pqal.json" in case.files:
                shutil.copytree(project / "data" / "raw", directory / "raw", dirs_exist_ok=True)
            status, problem = run(case, directory)
            params.write_bytes(whole)
            for name in ("raw", "model", "own", "t.csv", "t.xlsx", "other.csv"):
                remove(directory / name)
            row = counts.setdefault(case.kind, [0, 0, 0])
            if status == 0 and not case.must_fail:
                row[2] += 1
                continue
            row[0] += 1
            row[1] += not problem
            if problem:
                unclean.append(f"{case.kind}: {case.name[:300]}: {problem}")
                print(unclean[-1], flush=True)
    table = [f"{'kind':28} {'bad':>5} {'refused cleanly':>16} {'still valid':>12}"]
    table += [f"{kind:28} {bad:5} {clean:16} {valid:12}" for kind, (bad, clean, valid) in counts.items()]
    figures: Figures = {
        "faults.bad_inputs": (sum(row[0] for row in counts.values()), ""),
        "faults.bad_inputs_refused_cleanly": (sum(row[1] for row in counts.values()), ""),
    }
    kinds = " ".join(options.kinds)
    command = f"python -m benchmarks.bad_inputs --draws {options.draws} --seed {options.seed} --kinds {kinds}"
    record(figures, command, LOGS / "bad_inputs.log", text="\n".join([*table, *unclean]))
    sys.exit(bool(unclean))


if __name__ == "__main__":
    main()
