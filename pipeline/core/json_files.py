"""Strict reading of JSON files that users and model repositories write."""

import json
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail

REMEDY = "correct the file, then run `dvc repro`"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`: json itself keeps the last of two equal keys and drops the others silently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"duplicate keys {', '.join(map(repr, twice[:20]))}")
    return value


def read_json(path: Path, name: str = "") -> Any:
    """The JSON value in `path`, with or without a byte-order mark; raises `Fail`. `name` is its place in errors."""
    name = name or str(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise Fail(f"{name} is missing; run `dvc repro`") from None
    except UnicodeDecodeError as error:
        raise Fail(f"{name}, byte {error.start}: not valid UTF-8; {REMEDY}") from None
    except json.JSONDecodeError as error:
        raise Fail(f"{name}, line {error.lineno}: not valid JSON ({error.msg}); {REMEDY}") from None
    except RecursionError:
        raise Fail(f"{name}: not valid JSON (nested too deeply); {REMEDY}") from None
    except ValueError as error:  # duplicate keys, or a number of thousands of digits
        raise Fail(f"{name}: not valid JSON ({str(error).partition(': value')[0]}); {REMEDY}") from None


def read_json_object(path: Path, name: str = "") -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object."""
    value = read_json(path, name)
    if not isinstance(value, dict):
        raise Fail(f"{name or path} must hold a JSON object; {REMEDY}")
    return value
