"""params.yaml: strict types, every problem named, YAML 1.2, and no default that DVC could not track."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter
from ruamel.yaml import YAML

from pipeline.commands import check_params
from pipeline.commands.check_params import SECTIONS
from pipeline.core.errors import Fail
from pipeline.core.params import Section, load_params
from tests.conftest import ROOT, yaml

PROFILES = {path.stem: path for path in sorted((ROOT / "profiles").glob("*.yaml"))}
MICRO: dict[str, Any] = yaml.load(PROFILES["micro"].read_text())


class Near(Section):
    source: Literal["near"]
    r: Annotated[int, Field(gt=0)]
    learning_rate: float
    packing: bool


class Far(Section):
    source: Literal["far"]
    url: str


EITHER: TypeAdapter[Near | Far] = TypeAdapter(Annotated[Near | Far, Field(discriminator="source")])
GOOD = "toy:\n  source: near\n  r: 16\n  learning_rate: 1e-4\n  packing: false\n"


def load(text: str, model: Any) -> Any:
    Path("params.yaml").write_text(text)
    return load_params("toy", model)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("model", [Near, EITHER], ids=["section", "union"])
def test_a_number_is_read_as_yaml_1_2_has_it(model: Any):
    assert load(GOOD, model) == Near(source="near", r=16, learning_rate=0.0001, packing=False)


@pytest.mark.parametrize("model", [Near, EITHER], ids=["section", "union"])
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("  r: 16\n", "", "toy.r: "),
        ("  r: 16\n", "  r: 16\n  rank: 8\n", "toy.rank: "),
        *(("r: 16", f"r: {value}", "toy.r: ") for value in ("'16'", "16.0", "true", "", "0")),
        *(("1e-4", value, "toy.learning_rate: ") for value in ("fast", ".inf", ".nan")),
        *(("packing: false", f"packing: {value}", "toy.packing: ") for value in ("no thanks", "0")),
        ("source: near", "source: elsewhere", "'near'"),
        *(("toy:", value, "no section 'toy'") for value in ("train:", "- toy\n#", "toy: 3\n#")),
        ("r: 16", "r: [16", "line 4 is not valid YAML"),
        ("packing", "r: 8\n  packing", "line 5 is not valid YAML"),
    ],
)
def test_a_wrong_parameter_is_named(model: Any, old: str, new: str, named: str):
    assert old in GOOD
    text = GOOD.replace(old, new)
    with pytest.raises(Fail, match=r"^params\.yaml") as failure:
        load("\n".join(text.splitlines()[:1]) if "#" in text else text, model)
    assert str(failure.value).isprintable()
    assert named in str(failure.value)


def test_every_wrong_parameter_is_named_at_once():
    with pytest.raises(Fail, match=r"toy\.r: .*toy\.packing: .*toy\.rank: "):
        load("toy: {source: near, r: 0, rank: 1, learning_rate: 1}", EITHER)


def test_a_missing_file_is_refused():
    with pytest.raises(Fail, match=r"params\.yaml is not in this directory"):
        load_params("toy", Near)


def test_parameters_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load(GOOD, Near).r = 8


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_accepted_as_it_is(profile: str):
    Path("params.yaml").write_text(PROFILES[profile].read_text())
    values = yaml.load(PROFILES[profile].read_text())
    assert {section: load_params(section, model).model_dump() for section, model in SECTIONS.items()} == values


FILE = {"name": "a.json", "sha256": "8b" * 32}
FILES = {"source": "files", "location": "x", "records": FILE, "test_ground_truth": FILE}
HUB = {"source": "hub", "repo_id": "o/n", "revision": "0" * 40}


@pytest.mark.parametrize(
    ("section", "good", "wrong"),
    [
        ("download", FILES, [{"records": {"name": "a"}}, {"records": FILE | {"sha256": "8B" * 32}}, {"seed": 1}]),
        ("download", FILES, [{"records": FILE | {"name": "../a.json"}}, {"source": "web"}]),
        ("base", HUB, [{"revision": "main"}, {"repo_id": "o/n/f"}, {"path": "x"}]),
        ("base", {"source": "local", "path": "x"}, [{"path": ""}]),
        ("base", {"source": "tiny"}, [{"hidden_size": 128}]),
        ("evaluate", MICRO["evaluate"], [{"protocols": ["lm_eval"]}, {"protocols": ["chat", "chat"]}, {"n_ctx": 0}]),
        ("train", MICRO["train"], [{name: None} for name in MICRO["train"]]),
        ("train", MICRO["train"], [{"backend": "axolotl"}, {"seed": "3407"}, {"r": 0}, {"lora_dropout": 1.0}]),
        ("train", MICRO["train"], [{"target_modules": names} for names in ([], "all", ["lm_head"], ["q", "q"])]),
        ("train", MICRO["train"], [{"dtype": "int8"}, {"max_steps": 60.0}, {"learning_rate": 0.0}, {"optim": "sgd"}]),
        ("train", MICRO["train"], [{"learning_rate": "2e-4"}, {"warmup_steps": 4}, {"offload_embedding": True}]),
    ],
)
def test_a_value_that_a_stage_cannot_use_is_named(section: str, good: Any, wrong: list[dict[str, Any]]):
    assert isinstance(SECTIONS[section], TypeAdapter) or SECTIONS[section].model_validate(good)
    for change in wrong:
        with Path("params.yaml").open("w") as file:
            yaml.dump({section: good | change}, file)
        with pytest.raises(Fail, match=rf"^params\.yaml: {section}.*{next(iter(change))}"):
            load_params(section, SECTIONS[section])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({".git": None}, ["no git clone, and DVC needs one", "run `git init`"]),
        ({"params.yaml": None}, ["params.yaml is missing", "cp profiles/tiny.yaml params.yaml"]),
        ({"params.yaml": "train: ["}, ["params.yaml, line 1 is not valid YAML"]),
        ({"train": None, "report": {"bins": 0}}, ["has no section 'train'", "report.bins"]),
    ],
)
def test_a_run_that_cannot_begin_is_refused_with_every_problem_in_one_line(changes: dict[str, Any], words: list[str]):
    Path(".git").mkdir()
    YAML().dump(
        {name: value for name, value in (MICRO | changes).items() if value and "." not in name}, Path("params.yaml")
    )
    for name, text in changes.items():
        if name == ".git":
            Path(name).rmdir()
        elif name == "params.yaml":
            Path(name).write_text(text) if text else Path(name).unlink()
    if not words:
        check_params.main()
        return
    with pytest.raises(Fail) as caught:
        check_params.main()
    assert [word for word in words if word not in str(caught.value)] == []
    assert str(caught.value).count("not valid YAML") <= 1
