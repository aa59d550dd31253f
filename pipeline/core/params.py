"""Sections of params.yaml as strict pydantic models. The models themselves are in `pipeline.sections`."""

from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core.errors import Fail

Model = TypeVar("Model")


class Section(BaseModel):
    """One section of params.yaml. No field has a default: DVC cannot track a default that lives in code."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def load_params(section: str, model: type[Model] | TypeAdapter[Model]) -> Model:
    """The section `section` of ./params.yaml as `model`: a Section, or an adapter for a union of them by `source`.

    Raises `Fail` naming every parameter that is wrong.
    """
    values = read_section(section)
    try:
        return (model if isinstance(model, TypeAdapter) else TypeAdapter(model)).validate_python(values)
    except ValidationError as error:
        wrong: list[str] = []
        for problem in error.errors(include_input=False):
            path = [str(part) for part in problem["loc"]]
            tagged = path[:1] == [values.get("source")]  # by pydantic, with the union's member
            wrong.append(f"{'.'.join([section, *path[tagged:]])}: {problem['msg'].removeprefix('Value error, ')}")
        raise Fail(f"params.yaml: {'; '.join(wrong)}; correct it, then run `dvc repro`") from None


def read_section(section: str) -> dict[str, Any]:
    """The raw values under `section` in ./params.yaml, read as YAML 1.2 (PyYAML reads 1e-4 as a string)."""
    try:
        with Path("params.yaml").open(encoding="utf-8") as file:
            params: Any = YAML(typ="safe").load(file)  # pyright: ignore[reportUnknownMemberType]
    except FileNotFoundError:
        raise Fail("params.yaml is not in this directory; run this from the project's root") from None
    # ruamel raises all of these on malformed tags, dates, brackets and surrogates.
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise Fail(f"params.yaml{line} is not valid YAML; `git diff params.yaml` shows what changed") from None
    values = cast(dict[str, Any], params).get(section) if isinstance(params, dict) else None
    if not isinstance(values, dict):
        raise Fail(f"params.yaml has no section {section!r}; compare it with profiles/tiny.yaml")
    return cast(dict[str, Any], values)
