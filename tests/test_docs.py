"""The commands and edits that the pages show are run, on the micro profile, in a copy of the project.

A block that is not run here is named in ELSEWHERE, with the test that runs it, or in NOT_RUN, with the reason.
What the pages name without running it has its tests in test_pages.py.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from branches import commit, git, link_environment
from conftest import ROOT, output_of, run_command, run_stage, set_params, stages, stages_named, yaml
from pages import CHANGE, blocks, quoted, rows, sections
from ruamel.yaml import YAML

PUBMEDQA = ROOT.parent / "shared" / "pubmedqa"
STAGES = stages(ROOT)
HOOKS = [hook for repo in yaml.load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]


# The commands: which are run, and where

# Text of a block -> the test that runs it.
ELSEWHERE = {
    r""".venv/bin/python -m llama_cpp.server --model models/medical-reasoner.gguf --host 127.0.0.1 --port 8000 \
  --n_ctx 2048 --interrupt_requests false
""": "tests/stages/test_ask.py::test_the_server_sees_the_very_tokens_and_answers_whole_and_in_a_stream",
    """dvc pull                     # the GGUF, its model card, base, adapter and data
dvc repro --allow-missing    # has nothing to do
""": "tests/test_remote.py::test_after_a_pull_nothing_is_left_to_do",
    """dvc get ../medical-reasoner models/medical-reasoner.gguf
git -C ../medical-reasoner tag --annotate medical-reasoner@v1.0.0 --message 'the first version'
dvc artifacts get ../medical-reasoner medical-reasoner --rev v1.0.0 --out medical-reasoner-v1.0.0.gguf
""": "tests/test_remote.py::test_another_project_gets_the_gguf_with_the_lines_of_the_page",
    r"""dvc get https://github.com/OWNER/medical-reasoner models/medical-reasoner.gguf \
    --remote raw --remote-config url=https://raw.githubusercontent.com/OWNER/medical-reasoner/main/.dvc/release
""": "tests/test_remote.py::test_the_gguf_is_had_without_the_project",
    """git merge main
git checkout MERGE_HEAD -- dvc.lock metrics   # main's side, whole
dvc pull --allow-missing                      # main's data and models; skip it where nothing was pushed
dvc repro
git add dvc.lock metrics
git commit --no-edit
make push                                     # to a remote of your own; skip it without one
""": "tests/test_review.py::test_the_documented_way_out_of_a_conflict_in_dvc_lock",
    """. .venv/bin/activate
dvc pull                                                       # or dvc repro: the data and the base
dvc exp run --queue -S train.seed=1,2,3 train                  # three experiments
dvc exp run --queue -S train.seed=1,2 -S train.learning_rate=2e-4,2e-3 train    # a grid of four
dvc queue start -j 2                                           # two workers
dvc queue status
""": "tests/test_flows.py::test_a_sweep_of_seeds_runs_in_two_workers_and_becomes_mean_and_spread",
    "python -m pipeline.commands.experiments\n": (
        "tests/test_flows.py::test_a_sweep_of_seeds_runs_in_two_workers_and_becomes_mean_and_spread"
    ),
}

# Text of a block -> why no test runs it.
NOT_RUN = {
    """make repro   # set up .venv, run the pipeline, show the result: some eight minutes on two cores
make test    # the tests: as long again
""": "minutes; the second is what runs this",
    """make setup GPU=1      # needs Python 3.12, nvcc and driver 580, and says so if one is missing
cp profiles/llama3-8b-t4.yaml params.yaml
HF_TOKEN=... make repro
""": "a card, a licence and a download of 16 GB",
    """make setup                      # .venv, once; the other targets do it when needed
.venv/bin/pre-commit install    # `make check` at every commit
make check                      # format, lint, types, pages of figures
make test                       # some minutes on two cores
""": "minutes; the last is what runs this, and the hooks are run below",
    """make repro                       # the default, `tiny`: five minutes on two cores
make release-run                 # its data and models into .dvc/release, for `dvc pull`
python -m benchmarks.record      # README's table and RESULTS.md from metrics/ and results.json
""": "minutes; tests/test_remote.py has the second",
    r"""python3 -m venv ~/sky && ~/sky/bin/pip install 'skypilot[aws]==0.14.1'
export GIT_URL=https://x-access-token:TOKEN@github.com/OWNER/REPOSITORY
~/sky/bin/sky launch -c medical-reasoner infra/skypilot-t4.yaml --env REMOTE=s3://bucket/path --secret GIT_URL \
    --secret AWS_ACCESS_KEY_ID --secret AWS_SECRET_ACCESS_KEY --secret HF_TOKEN
""": "an account with a cloud; tests/test_rent.py runs what the file says",
    """git clone https://github.com/OWNER/medical-reasoner && cd medical-reasoner
make setup GPU=1                                # needs driver 580, nvcc, Python 3.12; says so if one is missing
cp profiles/llama3-8b-t4.yaml params.yaml       # its base is gated: accept the licence on its page first
HF_TOKEN=... make repro
""": "a card",
    """dvc exp apply above-nave
dvc repro
""": "the name of an experiment is made up by DVC",
}


RUN_HERE: dict[str, str] = {}  # text of a block -> the test below that runs it


def runs(beginning: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test gets, as `block`, the text of the one block of commands that begins so."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        (text,) = [block.text for block in blocks("sh") if block.text.startswith(beginning)]
        RUN_HERE[text] = test.__name__
        return pytest.mark.parametrize("block", [text], ids=[beginning.strip()])(test)

    return decorate


def example(language: str, words: str) -> str:
    """The one block of docs/change.md in a language that has these words."""
    (found,) = [block.text for block in blocks(language, "docs/change.md") if words in block.text]
    return found


@pytest.fixture(scope="module")
def repository(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, uncommitted edits included, with a run of the profile micro; origin/main is that run."""
    directory = tmp_path_factory.mktemp("docs") / "medical-reasoner"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for path in filter(None, listed):
        if not path.startswith(("metrics/", ".dvc/release/", "dvc.lock")) and (ROOT / path).is_file():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, directory / path)
    shutil.copytree(micro, directory, dirs_exist_ok=True)
    git(directory, "init", "--quiet", "--initial-branch=main")
    output_of(directory, "dvc cache dir --quiet --local ../cache && dvc commit --quiet --force")
    commit(directory, "a run")
    git(directory, "remote", "add", "origin", ".")
    git(directory, "fetch", "--quiet", "origin")
    return directory


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Path:
    """A copy of it to change, with an environment that is set up."""
    directory = Path(shutil.copytree(repository, tmp_path / "medical-reasoner", symlinks=True))
    output_of(directory, f"dvc cache dir --quiet --local {repository.parent}/cache")
    link_environment(directory)
    return directory


def test_every_block_of_commands_is_run_or_has_a_reason_not_to_be() -> None:
    shown = {block.text: str(block) for block in blocks("sh")}
    places = [RUN_HERE, ELSEWHERE, NOT_RUN]
    known = [text for place in places for text in place]
    assert len(known) == len(set(known))
    assert [told for text, told in shown.items() if text not in known] == [], "run it, or say where or why not"
    assert [text.splitlines()[0] for text in known if text not in shown] == [], "no page has it any more"


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_test_that_runs_a_block_elsewhere_exists(test: str) -> None:
    path, _, function = test.partition("::")
    assert f"\ndef {function}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_example_on_the_page_of_changes_is_used_below() -> None:
    calls = re.findall(r'example\("(\w+)", "([^"]+)"\)', Path(__file__).read_text(encoding="utf-8"))
    used = {example(language, words) for language, words in calls}
    languages = ("diff", "yaml", "json", "python")
    shown = [block for language in languages for block in blocks(language, "docs/change.md")]
    assert [str(block) for block in shown if block.text not in used] == []


# README, review, remotes and sweeps


@runs('echo "120 patients')
def test_a_question_is_asked(block: str, project: Path) -> None:
    printed = output_of(project, block.replace("/tmp/", f"{project.parent}/"))
    assert re.search(r"^(yes|no|maybe) \d+\.\d%", printed, re.MULTILINE)


@runs("dvc remote add --default store s3://bucket/medical-reasoner   #")
def test_a_run_is_pushed_to_a_remote(block: str, project: Path) -> None:
    output_of(project, block.replace("s3://bucket/medical-reasoner", "../store"))
    outs = yaml.load(project / "dvc.lock")["stages"]["quantize"]["outs"]
    (md5,) = [out["md5"] for out in outs if out["path"] == "models/medical-reasoner.gguf"]
    assert (project.parent / "store/files/md5" / md5[:2] / md5[2:]).is_file()


@runs("dvc remote add --default store s3://bucket/medical-reasoner    #")
def test_four_kinds_of_remote_can_be_named(block: str, project: Path) -> None:
    for line in block.splitlines():  # one of the four is meant
        output_of(project, line.replace("dvc remote add", "dvc remote add --force"))
        assert line.split()[5] in (project / ".dvc/config").read_text()


@runs("make lock ")
def test_a_change_is_reviewed(block: str, project: Path) -> None:
    printed = output_of(project, f"set -e\n{block}")
    assert "lock: dvc.lock agrees" in printed
    assert "gate: passed" in printed
    assert "## What this branch does to the results" in printed


@runs("dvc exp show")
def test_experiments_are_shown_without_figures_of_the_test(block: str, project: Path) -> None:
    printed = output_of(project, block)
    assert "validation_loss" in printed
    assert "accuracy" not in printed


# What runs again


def readers(paths: set[str]) -> set[str]:
    """The stages that read one of these paths."""
    return {
        stage
        for stage, about in STAGES.items()
        if any(
            Path(dep).is_relative_to(path) or Path(path).is_relative_to(dep) for dep in about["deps"] for path in paths
        )
    }


def written(stage: str) -> set[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in STAGES[stage].get(kind, [])]
    return {path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)}


def followers(found: set[str]) -> set[str]:
    """The stages that read, at first or second hand, what these write."""
    more = found | {reader for stage in found for reader in readers(written(stage))}
    return found if more == found else followers(more)


def test_the_table_of_what_runs_again_is_that_of_dvc_yaml() -> None:
    table = {row[0]: row[1:] for row in rows(sections(CHANGE)["What runs again"])}
    assert {key.strip("`") for key in table} == set(yaml.load(ROOT / "profiles/micro.yaml"))
    for section, (at_once, later) in table.items():
        first = {stage for stage, about in STAGES.items() if section.strip("`") in about["params"]}
        assert set(quoted(at_once)) == first, section
        assert set(quoted(later)) == followers(first) - first, section


@runs("dvc params diff")
def test_before_a_run_it_is_seen_what_would_run(block: str, project: Path) -> None:
    set_params(project, "report", bins=7)
    printed = output_of(project, block)
    assert re.search(r"report\.bins\W+10\W+7", printed)
    assert stages_named(printed) == ["report"]


@runs("dvc repro\ndvc metrics diff")
def test_after_a_run_it_is_seen_what_it_did(block: str, project: Path) -> None:
    set_params(project, "report", bins=7)
    printed = output_of(project, block)
    assert stages_named(printed) == ["report"]
    assert "tuned_calibration_error" in printed
    assert "tuned_accuracy" not in printed  # it stayed what it was


# Another model, other data


def put(path: Path, section: str, values: dict[str, Any]) -> None:
    """Replace a section of a file of parameters as a whole."""
    writer = YAML()
    writer.width = 1000  # a URL stays on its line
    writer.dump(yaml.load(path) | {section: values}, path)


def test_the_section_of_a_hub_model_is_one_that_base_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages import base

    (tmp_path / "params.yaml").write_text(example("yaml", "source: hub"))
    monkeypatch.chdir(tmp_path)
    assert isinstance(base.load_params(), base.Hub)
    profile = (ROOT / "profiles/llama3-8b-t4.yaml").read_text(encoding="utf-8")
    assert all(value in profile for value in base.load_params().model_dump().values())


def test_a_model_in_a_directory_is_taken_from_there(project: Path) -> None:
    shutil.copytree(project / "models/base", project.parent / "my-model")
    put(project / "params.yaml", "base", yaml.load(example("yaml", "source: local"))["base"])
    done = run_stage(project, "base")
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "models/base/manifest.json").read_text())["source"] == "local"
    assert not (project / "models/base/model.safetensors").exists()


def test_the_section_of_artificial_questions_is_one_that_download_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.download import load_params

    values = yaml.load(ROOT / "profiles/tiny-pubmedqa.yaml")["download"]
    values |= yaml.load(example("yaml", "qiaojin/PubMedQA").replace("SHA256", "a" * 64))["download"]
    YAML().dump({"download": values}, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_params().model_dump()["pqa_artificial"]["questions"] == 2000


@runs("cp profiles/tiny-pubmedqa.yaml params.yaml\nsed")
def test_the_questions_come_from_a_mirror(block: str, project: Path) -> None:
    if not PUBMEDQA.is_dir():
        pytest.skip("the real PubMedQA is not beside the project")
    (project.parent / "pubmedqa").symlink_to(PUBMEDQA)
    profile = project / "profiles/tiny-pubmedqa.yaml"  # its base takes minutes to make
    put(profile, "base", yaml.load(project / "profiles/micro.yaml")["base"])
    assert stages_named(output_of(project, block)) == ["download", "format"]
    assert json.loads((project / "metrics/format.json").read_text())["test"]["questions"] == 500


def test_the_record_on_the_page_is_one_that_format_takes() -> None:
    from pipeline.stages.format import problems

    records = json.loads(example("json", "final_decision"))
    assert [problem for pmid, record in records.items() for problem in problems(pmid, record)] == []
    for field in next(iter(records.values())):
        assert problems("q", {key: value for key, value in records["q-001"].items() if key != field}), field


@runs("mkdir ../my-questions")
class TestOwnQuestions:
    """From a table of 40 made-up questions to a result."""

    @pytest.fixture
    def own(self, block: str, project: Path) -> Path:
        lines = ["id,question,abstract,conclusion,answer,split"]
        for number in range(40):
            answer, split = ("yes", "no", "maybe")[number % 3], "test" if number % 4 == 0 else "train"
            abstract = f'"Trial {number}, of belacine: {answer}."'
            lines.append(f"q-{number:03},Does belacine help in {number}?,{abstract},It is {answer}.,{answer},{split}")
        (project.parent / "my-questions.csv").write_text("\n".join(lines) + "\n")
        printed = output_of(project, block)
        hashes = {Path(path).name: digest for digest, path in (line.split() for line in printed.splitlines())}
        values = yaml.load(example("yaml", "records.json"))["download"]
        for file in (values["records"], values["test_ground_truth"]):
            file["sha256"] = hashes[file["name"]]
        put(project / "params.yaml", "download", values)
        return project

    def test_they_are_taken_and_split_as_the_table_says(self, own: Path) -> None:
        assert stages_named(output_of(own, "dvc repro format")) == ["download", "format"]
        found = json.loads((own / "metrics/format.json").read_text())
        assert [found[split]["questions"] for split in ("train", "validation", "test")] == [22, 8, 10]
        assert json.loads((own / "data/raw/source.json").read_text())["name"] == "own data"

    @pytest.mark.slow
    def test_they_end_in_a_file_that_ships_and_its_figures(self, own: Path) -> None:
        ran = stages_named(output_of(own, "dvc repro"))
        assert sorted(ran) == sorted(STAGES.keys() - {"base"})
        figures = json.loads((own / "metrics/compare.json").read_text())
        assert (figures["questions"], figures["simulated"]) == (10, False)


# The prompt, a parameter, a stage: the page's own edits, and what the tests then ask for


def apply(project: Path, diff: str) -> None:
    command = ["git", "apply", "--unidiff-zero", "-"]
    done = subprocess.run(command, cwd=project, input=diff, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"docs/change.md: a diff no longer applies: {done.stderr}"


@runs("python -m pytest tests/unit/test_prompt.py")
def test_another_prompt_is_another_version_and_its_digest_is_shown(block: str, project: Path) -> None:
    apply(project, example("diff", "PROTOCOLS"))
    done = run_command(project, block)
    assert done.returncode == 1
    for protocol in ("chat", "question_only"):
        assert re.search(rf"\('{protocol}', 2\), '[0-9a-f]{{16}}'", done.stdout), done.stdout


def with_a_parameter(project: Path, block: str) -> None:
    apply(project, example("diff", "adam_beta2"))
    output_of(project, block.splitlines()[0])


def with_a_stage(project: Path) -> None:
    (project / "pipeline/stages/errors.py").write_text(example("python", "Errors"))
    with (project / "dvc.yaml").open("a") as file:
        file.write("\n" + example("yaml", "pipeline.stages.errors"))
    apply(project, example("diff", "metrics/errors.json"))


# The tests that the page names, without those that run the pipeline.
ALL_TABLES = "leaf_of_a_profile_is_in_the_table module_is_in_the_table extra_is_in_the_table stage_is_in_the_tables"
# The rest of tests/test_repro.py runs stages that no example touches.
TABLES_ALONE = {"PYTEST_ADDOPTS": "-k 'test_dvc_yaml or table or reaches'"}
QUICK = ["tests/test_dvc_yaml.py", *(f"tests/test_repro.py::test_every_{table}" for table in ALL_TABLES.split())]


def test_the_tests_ask_for_each_edit_and_pass_with_all_of_them(project: Path) -> None:
    with_a_parameter(project, next(text for text in RUN_HERE if text.startswith("sed")))
    with_a_stage(project)
    output_of(project, f"python3 -m pytest -q -p no:cacheprovider {' '.join(QUICK)} -k 'not torch'")
    git(project, "checkout", "tests/test_repro.py", "profiles/micro.yaml")
    done = run_command(
        project, f"python3 -m pytest -q -p no:cacheprovider {' '.join(QUICK)} -k 'profile or every_stage_is'"
    )
    assert "train.adam_beta2: Field required" in done.stdout  # micro.yaml lacks it
    assert "assert ['train.adam_beta2'] == []" in done.stdout  # and the table
    assert "'errors'" in done.stdout


def test_the_code_of_the_examples_passes_the_checks(project: Path) -> None:
    with_a_stage(project)
    apply(project, example("diff", "PROTOCOLS"))
    apply(project, example("diff", "adam_beta2"))
    output_of(project, "ruff format --check && ruff check")


@pytest.mark.slow
@runs("sed -i 's/^  weight_decay")
def test_a_parameter_reaches_the_stages_that_its_table_says_and_the_model(block: str, project: Path) -> None:
    with_a_parameter(project, block)
    output_of(project, block.splitlines()[1], **TABLES_ALONE)
    before = (project / "models/adapter/adapter_model.safetensors").read_bytes()
    set_params(project, "train", adam_beta2=0.5)
    assert stages_named(output_of(project, "dvc repro train")) == ["train"]
    assert (project / "models/adapter/adapter_model.safetensors").read_bytes() != before


@runs("python -m pytest tests/test_dvc_yaml.py tests/test_repro.py\ndvc repro errors")
class TestAStage:
    def test_it_runs_alone_and_counts(self, block: str, project: Path) -> None:
        with_a_stage(project)
        assert stages_named(output_of(project, block.splitlines()[1])) == ["errors"]
        found = json.loads((project / "metrics/errors.json").read_text())
        figures = json.loads((project / "metrics/compare.json").read_text())
        assert found["wrong"] == round(figures["questions"] * (1 - figures["tuned_accuracy"]))
        assert 0 <= found["wrong_and_sure"] <= found["wrong"]

    @pytest.mark.slow
    def test_it_reaches_and_is_reached_as_its_tables_say(self, block: str, project: Path) -> None:
        with_a_stage(project)
        output_of(project, block.splitlines()[0], **TABLES_ALONE)


# The hooks of CONTRIBUTING


@pytest.fixture
def committed(project: Path) -> Path:
    """The project with the metrics that README's table was written from."""
    shutil.copytree(ROOT / "metrics", project / "metrics", dirs_exist_ok=True)
    commit(project, "the embedded default's metrics")
    return project


def run_hooks(project: Path, command: str, skip: str) -> subprocess.CompletedProcess[str]:
    git(project, "add", "--all")
    offline = {"PRE_COMMIT_HOME": str(project.parent / "hooks"), "https_proxy": "http://127.0.0.1:9"}
    return run_command(project, command, SKIP=skip, **offline)


def test_the_hooks_pass_here_and_stop_a_commit_that_make_check_would_refuse(committed: Path) -> None:
    done = run_hooks(committed, ".venv/bin/pre-commit run --all-files", "types")  # that one takes half a minute
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Passed") == len(HOOKS) - 1
    output_of(committed, ".venv/bin/pre-commit install")
    (committed / "pipeline/commands/lock.py").write_text("import os\nx  = 1\n")
    (committed / "benchmarks/RESULTS.md").write_text("")
    done = run_hooks(committed, "git -c user.name=A -c user.email=a@example.org commit --message 'a mistake'", "types")
    assert re.findall(r"^(.*?)\.+Failed$", done.stderr, re.MULTILINE) == ["format", "lint", "pages of figures"]
    assert git(committed, "log", "-1", "--format=%s").strip() == "the embedded default's metrics"


@pytest.mark.slow
def test_the_type_hook_stops_a_wrong_type(committed: Path) -> None:
    with (committed / "pipeline/commands/lock.py").open("a") as file:
        file.write("x: int = 'text'\n")
    done = run_hooks(committed, ".venv/bin/pre-commit run --all-files", "format,lint,figures")
    assert re.search(r"^types\.+Failed$", done.stdout, re.MULTILINE), done.stdout
