"""Whether the embedded default's result is luck: `python -m benchmarks.seeds` trains it again with three other seeds.

Each seed is a `dvc repro` with another train.seed, in a clone that shares this project's cache, so that the base is not
made again. Run it after `dvc repro`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.record import HERE, record

SEEDS = (1, 2, 3)
LOG = HERE / "logs" / "seeds.log"


def run(*command: str, cwd: Path) -> None:
    """Run a command with this project's environment first on PATH."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=cwd, check=True, env=env)


def main() -> None:
    project = HERE.parent
    committed = json.loads((project / "metrics" / "compare.json").read_text(encoding="utf-8"))
    runs = {"committed": committed}
    with TemporaryDirectory() as temporary:
        clone = Path(temporary, "clone")
        run("git", "clone", "-q", str(project), str(clone), cwd=project)
        run("dvc", "cache", "dir", "--local", str(project / ".dvc" / "cache"), cwd=clone)
        run("dvc", "checkout", "--allow-missing", "-q", cwd=clone)
        params = (clone / "params.yaml").read_text(encoding="utf-8")
        for seed in SEEDS:
            changed = params.replace("  seed: 3407\n", f"  seed: {seed}\n")
            (clone / "params.yaml").write_text(changed, encoding="utf-8")
            run("dvc", "repro", "--no-run-cache", "report", cwd=clone)
            runs[str(seed)] = json.loads((clone / "metrics" / "compare.json").read_text(encoding="utf-8"))
            tuned = json.loads((clone / "metrics" / "evaluate.json").read_text(encoding="utf-8"))["chat"]
            runs[str(seed)] |= {f"tuned_{key}": value for key, value in tuned.items() if key.startswith("recall")}
    LOG.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    figures: dict[str, tuple[float, str]] = {}
    for seed in map(str, SEEDS):
        figures[f"tiny.seed_{seed}.tuned_accuracy"] = (runs[seed]["tuned_accuracy"], "")
        figures[f"tiny.seed_{seed}.accuracy_difference_low"] = (runs[seed]["tuned_minus_base_accuracy_low"], "")
        lowest = min(runs[seed][f"tuned_recall_{label}"] for label in ("yes", "no", "maybe"))
        figures[f"tiny.seed_{seed}.lowest_recall"] = (lowest, "")
    record(figures, "python -m benchmarks.seeds", LOG)


if __name__ == "__main__":
    main()
