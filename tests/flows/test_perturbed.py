"""A user's own run changes params.yaml, dvc.lock and metrics/, and neither `make check` nor `make test` minds.

Another CPU rounds differently: every figure, log-probability and hash of a `make repro` can differ from the committed.
"""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.mutations import copy_project
from tests.branches import git
from tests.conftest import ROOT, output_of

FIGURE = re.compile(r"(?<![\w.])-?\d+\.\d+(?![\w.])")
OF_A_RUN = r"params\.yaml|dvc\.lock|metrics|models|data"
# Every test that could have read a figure or a parameter of the committed run in its own process.
TESTS = "tests/unit $(ls tests/test_*.py | grep -v test_repro)"


def perturb(project: Path) -> None:
    """Change what a run writes and git has: every figure a little, every hash, and the profile."""
    for path in [*project.glob("metrics/**/*.json"), *project.glob("metrics/**/*.csv")]:
        text = path.read_text(encoding="utf-8")
        path.write_text(FIGURE.sub(lambda found: f"{float(found[0]) * 1.002 + 0.0001:.4f}", text), encoding="utf-8")
    lock = project / "dvc.lock"
    lock.write_text(re.sub(r"(?<=md5: )\w{32}", lambda found: found[0][::-1], lock.read_text()))
    shutil.copyfile(project / "profiles/tiny-pubmedqa.yaml", project / "params.yaml")


@pytest.mark.slow
def test_after_a_run_that_rounds_differently_the_check_and_the_tests_pass(micro: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    copy_project(project)
    (project / "setup/install.sh").chmod(0o755)  # copies have no modes
    perturb(project)
    changed = {line.split()[-1] for line in git(project, "status", "--porcelain").splitlines()}
    assert {"params.yaml", "dvc.lock", "metrics/compare.json", "metrics/predictions/tuned.csv"} <= changed
    output_of(project, "python3 -m benchmarks.record --check")
    pytest_alone = f"env -u PYTEST_XDIST_WORKER python3 -m pytest -q -p no:cacheprovider --basetemp={tmp_path}/inner"
    output_of(project, f"{pytest_alone} {TESTS}", MICRO=str(micro.parent))


def test_no_test_names_a_committed_file_of_a_run() -> None:
    committed = re.compile(rf'ROOT\s*/\s*f?"({OF_A_RUN})\b|ROOT\.glob\(f?"({OF_A_RUN})\b')
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert [f"{path.name}: {found[0]}" for path, text in sources.items() for found in committed.finditer(text)] == []
