"""Time what a newcomer does: clone, `make setup`, `dvc repro` of the embedded default stage by stage, and once more.

`python -m benchmarks.repro` clones this commit into a temporary directory with empty caches, so that none helps.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import HERE, record

COMMAND = "python -m benchmarks.repro"
LOG = HERE / "logs" / "repro.log"
PYTHON = os.environ.get("PYTHON", str(Path(sys.base_prefix, "bin", "python3")))


def timed(command: list[str], cwd: Path, caches: Path, log: list[str]) -> list[tuple[float, str]]:
    """Run a command with a bare environment; its output lines with the second at which each began."""
    log.append(f"$ {' '.join(command)}")
    # The real home says where pip finds packages; what it has cached would make set-up look faster than it is.
    env = {"HOME": os.environ["HOME"], "XDG_CACHE_HOME": str(caches), "PATH": os.defpath, "PYTHON": PYTHON}
    start = time.monotonic()
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append((time.monotonic() - start, line.rstrip()))
            log.append(f"{lines[-1][0]:8.2f} {line.split(chr(13))[-1].rstrip()}")
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n" + "\n".join(log[-20:]))
    return [*lines, (time.monotonic() - start, "")]


def stage_seconds(lines: list[tuple[float, str]]) -> dict[str, float]:
    """Wall seconds of each stage: from its 'Running stage' line to the next stage's, or to the end."""
    starts = [(at, found[1]) for at, line in lines if (found := re.match(r"Running stage '(\w+)'", line))]
    ends = [at for at, _ in starts[1:]] + [lines[-1][0]]
    return {name: round(end - at, 1) for (at, name), end in zip(starts, ends, strict=True)}


def main() -> None:
    log: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        clone, caches = Path(temporary, "medical-reasoner"), Path(temporary, "caches")
        subprocess.run(["git", "clone", "-q", HERE.parent, clone], check=True)
        setup = timed(["make", "setup"], clone, caches, log)[-1][0]
        noop_setup = timed(["make", "setup"], clone, caches, log)[-1][0]
        (clone / "dvc.lock").unlink(missing_ok=True)
        repro = timed([".venv/bin/dvc", "repro"], clone, caches, log)
        noop = timed([".venv/bin/dvc", "repro"], clone, caches, log)[-1][0]
        compare = json.loads((clone / "metrics" / "compare.json").read_text(encoding="utf-8"))
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("\n".join(log).replace(temporary, "/tmp") + "\n", encoding="utf-8")
    seconds = {
        "setup.wall_s": round(setup, 1),
        "setup.noop.wall_s": round(noop_setup, 2),
        "repro.tiny.wall_s": round(repro[-1][0], 1),
        "repro.noop.wall_s": round(noop, 2),
        **{f"repro.tiny.{stage}.wall_s": value for stage, value in stage_seconds(repro).items()},
    }
    accuracies = {f"tiny.{name}_accuracy": round(compare[f"{name}_accuracy"], 4) for name in ("base", "tuned", "tfidf")}
    figures = {key: (value, "s") for key, value in seconds.items()} | {k: (v, "") for k, v in accuracies.items()}
    record(figures, COMMAND, LOG)


if __name__ == "__main__":
    main()
