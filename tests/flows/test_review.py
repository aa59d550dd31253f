"""Review with make, git and DVC: is dvc.lock in step, is a change judged, and the way out of conflicts in dvc.lock."""

import re
from pathlib import Path

import pytest

from pipeline.core.outputs import write_json
from tests.branches import commit, git, link_environment, repository, table, write
from tests.conftest import ROOT, output_of, repro, run_command, stages_named, yaml
from tests.flows.conftest import copy_of

# metrics/compare.json before it was nested
FLAT = {"tuned_accuracy": 0.8, "tuned_accuracy_low": 0.73, "base_accuracy": 0.5, "questions": 200}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.unlink()
    path.write_text(text.replace(old, new))


# Lock


TRAINED = "train, merge, quantize, evaluate, reference, generate, report"


@pytest.mark.parametrize(
    ("edits", "stale"),
    [
        pytest.param({"params.yaml": ("lora_alpha: 16", "lora_alpha: 32")}, TRAINED, marks=pytest.mark.slow),
        (
            {
                "metrics/baseline.json": ('"majority"', '"most"'),
                "pipeline/stages/generate.py": ("def main(", "# a comment\ndef main("),
            },
            "baseline, generate, report",
        ),
    ],
    ids=["parameter", "result and code"],
)
def test_lock_names_the_stages_that_are_out_of_step_without_data(
    edits: dict[str, tuple[str, str]], stale: str, committed: Path, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "--quiet", str(committed), "clone")
    clone = tmp_path / "clone"
    for path, (old, new) in edits.items():
        edit(clone / path, old, new)
    done = run_command(clone, "python3 -m pipeline lock")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"parameters or results of {stale} (stages after" in line
    assert git(clone, "status", "--porcelain").split() == [word for path in edits for word in ("M", path)]  # no other


# Gate and comment, as the Makefile and the workflow start them; tests/unit/test_gate.py has what they decide


def test_a_change_is_judged_and_told_with_make_from_git_alone(tmp_path: Path) -> None:
    project = repository(tmp_path / "project")
    link_environment(project)
    write(project, table(range(60)), table(range(100)))
    refused = run_command(project, "make gate MAIN=main")
    assert refused.returncode != 0
    said, *by_make = refused.stderr.splitlines()
    assert said.startswith("gate: failed: the tuned model is worse than main: -10.0")
    assert (refused.stdout, len(by_make)) == ("", 1)

    git(project, "switch", "--quiet", "main", "--force")
    write_json(project / "metrics/compare.json", FLAT)
    commit(project, "metrics of an earlier format")
    git(project, "switch", "--quiet", "change")
    assert output_of(project, "make gate MAIN=main").startswith("gate: passed: not comparable with main: ")
    text = output_of(project, "make comment MAIN=main PICTURES=https://example.org/pictures")
    assert text.startswith("<!-- medical-reasoner: report -->\n## Gate: passed\n\nNot comparable with main: ")
    assert "(https://example.org/pictures/accuracy.svg)" in text
    assert git(project, "diff", "--stat") == ""


# Conflicts


@pytest.mark.slow
def test_the_documented_way_out_of_a_conflict_in_dvc_lock(committed: Path, tmp_path: Path) -> None:
    project = copy_of(committed, tmp_path / "project")
    link_environment(project)
    output_of(project, "dvc remote add --quiet --default store ../store")
    commit(project, "a store")
    git(project, "switch", "--quiet", "--create", "change")
    edits = [  # both change figures, whatever the micro model has learned
        ("change", "confidence: 0.95", "confidence: 0.9", ["report"]),
        ("main", "[chat, lm_eval, question_only]", "[chat, lm_eval]", ["baseline", "evaluate", "report"]),
    ]
    for branch, old, new, ran in edits:
        git(project, "switch", "--quiet", branch)
        edit(project / "params.yaml", old, new)
        assert sorted(repro(project)) == ran
        commit(project, f"{branch}: {new}")
    git(project, "switch", "--quiet", "change")

    page = (ROOT / "docs/review.md").read_text()
    (block,) = re.findall(r"runs these lines -->\n```sh\n(.*?)```", page, re.DOTALL)
    merge, *way_out = block.splitlines()
    assert "CONFLICT (content): Merge conflict in dvc.lock" in run_command(project, merge).stdout
    lines = ["set -e", "git config user.name A", "git config user.email a@example.org", *way_out]
    assert stages_named(output_of(project, "\n".join(lines))) == ["report"]

    assert git(project, "status", "--porcelain") == ""
    params = yaml.load(project / "params.yaml")
    assert (params["report"]["confidence"], params["evaluate"]["protocols"]) == (0.9, ["chat", "lm_eval"])
    lock = yaml.load(project / "dvc.lock")["stages"]
    assert lock["report"]["params"]["params.yaml"]["report"] == params["report"]
    assert lock["evaluate"]["params"]["params.yaml"]["evaluate"] == params["evaluate"]
    assert output_of(project, "python3 -m pipeline lock").startswith("lock: dvc.lock agrees")
    assert any((tmp_path / "store").rglob("*"))  # pushed

    edit(
        project / "params.yaml", "confidence: 0.9", "confidence: 0.95"
    )  # DVC has main's run in its cache, and would not run it again
    assert "results of report (stages after" in run_command(project, "python3 -m pipeline lock").stderr
