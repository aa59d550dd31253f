"""Reading and writing the pipeline's files, and the key under which a killed stage finds what it had written.

Every error names file and line, never the text.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.core.stage import Fail, Section, writing

Record = dict[str, Any]  # one PubMedQA question: QUESTION, CONTEXTS, LABELS, final_decision, LONG_ANSWER, ...
Message = dict[str, str]  # role and content
CHECKPOINTS = Path(".checkpoints")  # what a killed stage goes on from; no output: DVC would remove it before the run
AGAIN = "correct the file, or let `dvc repro` make it again"
ABSURD = f"a number of thousands of digits, or brackets a thousand deep; {AGAIN}"


def read_text(path: Path) -> str:
    """The text in `path`; raises `Fail` if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Fail(f"{path} is missing; run `dvc repro`") from None
    except UnicodeDecodeError as error:
        raise Fail(f"{path}, byte {error.start}: not valid UTF-8; {AGAIN}") from None


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises `Fail` with file and line if it is missing or malformed, or repeats a key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):  # json would keep the last and lose the others
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise Fail(f"{path}: the key {twice!r} comes more than once; {AGAIN}")
        return value

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise Fail(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); {AGAIN}") from None
    except (ValueError, RecursionError):
        raise Fail(f"{path}: {ABSURD}") from None


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in `path`; raises `Fail` unless it is one that holds all of `keys`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise Fail(f"{path} is no JSON object; {AGAIN}")
    if missing := [key for key in keys if key not in value]:
        raise Fail(f"{path} has no {missing[0]!r}; {AGAIN}")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON object on each line of `path`; raises `Fail` with file and line number."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise Fail(f"{path}, line {number}: not valid JSON ({error.msg}); {AGAIN}") from None
        except (ValueError, RecursionError):
            raise Fail(f"{path}, line {number}: {ABSURD}") from None
        if not isinstance(row, dict):
            raise Fail(f"{path}, line {number}: not a JSON object; {AGAIN}")
        rows.append(row)
    return rows


def is_text(value: Any) -> bool:
    """Whether the value is a string that can be written as UTF-8: JSON's \\ud800 alone is half a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def read_examples(path: Path, test: bool = False) -> list[dict[str, Any]]:
    """The rows of a file that `format` writes: pmid, label, prompt and completion; raises `Fail` with file and line.

    A row of the `test` file holds the prompts of the other protocols, too.
    """

    def turns(value: Any) -> bool:
        return (
            isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and is_turn(turn) for turn in value)
        )

    def is_turn(turn: Any) -> bool:
        return turn.keys() == {"role", "content"} and is_text(turn["role"]) and is_text(turn["content"])

    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        named = is_text(row.get("pmid")) and row.get("label") in ("yes", "no", "maybe")
        whole = not test or (is_text(row.get("lm_eval")) and turns(row.get("question_only")))
        if not (named and whole and turns(row.get("prompt")) and turns(row.get("completion"))):
            raise Fail(f"{path}, line {number}: not an example as `format` writes it; run `dvc repro format`")
    if not rows:
        raise Fail(f"{path} holds no example; run `dvc repro format`")
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, so that equal values are equal files."""
    with writing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    with writing(path) as partial, partial.open("w", encoding="utf-8") as file:
        # \u2028 and its like would end a line for str.splitlines: JSON escapes keep one row on one line.
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_csv(path: Path, columns: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a header and rows of plain numbers and words (no quoting is needed, none is done)."""
    with writing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(",".join(columns) + "\n")
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)


def sha256(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_key(params: Section, inputs: list[Path], device: str) -> str:
    """A hash of all that determines a run: parameters, the files of `inputs`, loaded code, versions and device."""
    code = {str(module.__file__) for name, module in sys.modules.items() if name.split(".")[0] == "pipeline"}
    about = {
        "params": params.model_dump(),
        "inputs": [sha256(path) for path in inputs],
        "code": sorted(sha256(Path(path)) for path in code),
        "versions": sorted({f"{found.name}=={found.version}" for found in distributions()}),
        "device": device,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
