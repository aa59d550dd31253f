"""Values drawn from every parameter's type and bounds: accepted, or refused in a sentence that names the parameter.

The slow test runs the stage that owns the section on what was accepted: SECTION_DRAWS draws, each with 4 GiB of memory
and SECTION_SECONDS seconds (what takes longer is counted apart).
"""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pipeline.core import params
from pipeline.core.errors import Fail
from pipeline.core.params import Section, load_params
from pipeline.sections.base import Hub, Local, Tiny
from pipeline.sections.download import Files, Simulated
from pipeline.sections.pretrain import NoPretraining, Pretrain
from tests.conftest import stages
from tests.unit import test_params
from tests.unit.test_params import MICRO

DRAWS, SEED, SECONDS = (
    int(os.environ.get(f"SECTION_{name}", value)) for name, value in (("DRAWS", 6), ("SEED", 1), ("SECONDS", 60))
)
BYTES = 4 << 30
SECTIONS: dict[str, Any] = {**test_params.SECTIONS}
MEMBERS: dict[str, Any] = {
    "base": [Hub, Local, Tiny],
    "download": [Files, Simulated],
    "pretrain": [NoPretraining, Pretrain],
}  # of the sections that are unions
ODD = (
    "|(|[|.*|q_proj|q_proj |q_proj\n|self_attn.q_proj|layers.0.mlp.up_proj|x|lm_head|model.lm_head|embed_tokens|proj|"
    ".q_proj|q_proj.|q-proj|q_prój|all-linear|\ud800|\x00|\u2028|<eot_id>|~/x|../x|a/b|a--b/c|é/é|null|1e-4"
).split("|")
NUMBERS = [-1, 0, 1, 2**31, 2**32, 2**63, 2**64, 10**30, 1e300, 1e-300, 5e-324, 0.5, float("inf"), float("nan")]
lenient: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def drawn(kind: Any, rules: list[Any]) -> st.SearchStrategy[Any]:
    """Values of a field's type: within its bounds, at them, beyond them, and such as its pattern matches."""
    rules = [*rules, *(inner for rule in rules for inner in getattr(rule, "metadata", []))]
    if hasattr(kind, "__metadata__"):  # Annotated
        return drawn(get_args(kind)[0], [*rules, *kind.__metadata__])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        return st.lists(drawn(get_args(kind)[0], []), max_size=4)
    if kind is bool:
        return st.booleans()
    if kind is str:
        patterns = [st.from_regex(rule.pattern, fullmatch=True) for rule in rules if getattr(rule, "pattern", None)]
        return st.one_of(*patterns, st.sampled_from(ODD), st.text(max_size=6))
    if kind not in (int, float):
        return section(kind)
    low = next((getattr(rule, "ge", getattr(rule, "gt", None)) for rule in rules if isinstance(rule, Ge | Gt)), None)
    high = next((getattr(rule, "le", getattr(rule, "lt", None)) for rule in rules if isinstance(rule, Le | Lt)), None)
    edges: list[Any] = [kind(edge + step) for edge in (low, high) if edge is not None for step in (-1, 0, 1)]
    edges += [number for number in NUMBERS if type(number) is kind]
    if kind is float:
        return st.floats(low, high) | st.sampled_from(edges)
    return st.integers(low, high) | st.integers(low, (low or 0) + 64) | st.sampled_from(edges)


def section(model: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    fields = model.model_fields.items()
    return st.fixed_dictionaries({name: drawn(field.annotation, field.metadata) for name, field in fields})


def draws(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Values for a section; few differ from the micro profile's, so that many are accepted."""
    if name in MEMBERS:
        return st.one_of(*map(section, MEMBERS[name]))
    keys = st.sets(st.sampled_from(sorted(MICRO[name])), min_size=1, max_size=3)
    return st.tuples(section(SECTIONS[name]), keys).map(
        lambda pair: MICRO[name] | {key: pair[0][key] for key in pair[1]}
    )


def load(name: str, values: dict[str, Any]) -> Any:
    """The section, or the sentence of its refusal; any other exception is the test's failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "read_section", {name: values}.get)
        try:
            return load_params(name, SECTIONS[name])
        except Fail as error:
            return str(error)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_value_of_the_right_type_is_accepted_or_its_parameter_named(name: str):
    counts: Counter[bool] = Counter()

    @settings(max_examples=150, **lenient)
    @given(draws(name))
    def attempt(values: dict[str, Any]) -> None:
        found = load(name, values)
        counts[isinstance(found, str)] += 1
        if isinstance(found, str):
            assert found.startswith(f"params.yaml: {name}")
            assert found.isprintable()
            assert any(key in found for key in values), found
        else:
            assert found.model_dump() == values

    attempt()
    assert counts[False], "nothing is accepted, so nothing is tested"


def run_limited(project: Path, name: str) -> tuple[int | None, str]:
    """Exit status of the stage (None: it takes too long) and what it printed."""
    try:
        done = subprocess.run(
            [sys.executable, *stages(project)[name]["cmd"].partition("python3 ")[2].split()],
            cwd=project,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(project / "hub"), "OMP_NUM_THREADS": "2"},
            capture_output=True,
            timeout=SECONDS,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES)),  # RLIMIT_AS: V8 reserves more
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stderr.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_no_accepted_value_ends_the_stage_that_owns_it_in_a_traceback_or_an_abort(project: Path, name: str):
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    (project / "params.yaml").write_text(json.dumps(MICRO))
    status, printed = run_limited(project, name)
    assert status == 0, f"the unchanged section fails, so no draw would show anything: {status} {printed[-1500:]}"

    @seed(SEED)
    @settings(max_examples=DRAWS, phases=[Phase.generate], **lenient)
    @given(draws(name).filter(lambda values: not isinstance(load(name, values), str)))
    def attempt(values: dict[str, Any]) -> None:
        if name == "train":
            values |= {"max_steps": 1, "warmup_steps": min(values["warmup_steps"], 1)}
        (project / "params.yaml").write_text(json.dumps(MICRO | {name: values}))
        status, printed = run_limited(project, name)
        outcomes[str(status)] += 1
        if status not in (0, 1, None) or "Traceback" in printed:
            bad.append(f"{status} {json.dumps(values)} {printed[-1500:]}")

    attempt()
    sys.stderr.write(f"{name}: exit status -> draws {dict(outcomes)}; None: more than {SECONDS} seconds\n")
    assert bad == []
