"""A disk that is full or read-only ends a stage with one sentence, and leaves every output as it was."""

from pathlib import Path

import pytest

from tests.conftest import can_run, refused, run_command, stages

# In a mount namespace: a small file system with the project on it, filled up or read-only; then the stage. With WHEN it
# is filled once the stage has started its last child, llama.cpp's converter, which is after the check for room.
SCRIPT = """
set -e
mount -t tmpfs -o size=96m none "$DISK"
cp -a "$PROJECT" "$DISK/project"
cd "$DISK/project"
list() { find data models metrics -type f ! -name '*_resources.json' ! -name train_memory.csv | sort; }
fill() { fallocate -l $(( ($(df --output=avail -k . | tail -1) - FREE) * 1024 )) "$DISK/filler"; }
list | xargs sha256sum > /dev/shm/before.$$
if [ "$FREE" = read-only ]; then
    mount -o remount,ro "$DISK"
elif [ -z "$WHEN" ]; then
    fill
fi
set +e
PYTHONDONTWRITEBYTECODE=1 sh -c "$COMMAND" > /dev/null &
stage=$!
if [ -n "$WHEN" ]; then
    while [ -d /proc/$stage ]; do
        grep -qs "$WHEN" $(sed 's|[0-9][0-9]*|/proc/&/cmdline|g' /proc/$stage/task/$stage/children) /dev/null && break
        sleep 0.01
    done
    fill
fi
wait $stage
status=$?
find data models metrics .checkpoints -name '*.partial' 2> /dev/null | sed 's/^/left over: /'
list | xargs sha256sum | cmp - /dev/shm/before.$$
rm /dev/shm/before.$$
exit $status
"""
STAGES = (
    "download",
    "base",
    "format",
    "train",
    "merge",
    "quantize",
    "evaluate",
    "reference",
    "baseline",
    "generate",
    "report",
)
LONG = {  # KiB of free disk that end in the middle of what a stage writes at length on micro
    "download": 40,  # the questions
    "format": 24,  # the training examples
    "report": 100,  # the pictures
    "train": 600,  # a checkpoint's optimizer
    "merge": 900,  # the weights
    "evaluate": 4,  # the table, after a whole journal
}
CASES = [(stage, free, "") for stage in STAGES for free in ("0", "8", "read-only")]
CASES += [(stage, str(free), "") for stage, free in LONG.items()]
CASES += [(stage, "900", "models.converter") for stage in ("quantize", "reference", "baseline", "generate")]


@pytest.mark.skipif(not can_run("unshare -rm"), reason="this machine allows no mount namespace")
@pytest.mark.parametrize(
    ("stage", "free", "when"),
    [pytest.param(*case, marks=() if case[0] == "download" else pytest.mark.slow) for case in CASES],
)
def test_a_full_or_read_only_disk(micro: Path, tmp_path: Path, stage: str, free: str, when: str) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "script").write_text(SCRIPT)
    names = {"DISK": str(tmp_path / "disk"), "PROJECT": str(micro), "FREE": free, "WHEN": when, "SAVE_STEPS": "1"}
    done = run_command(tmp_path, "unshare -rm sh script", COMMAND=stages(micro)[stage]["cmd"], **names)
    said = refused(done, f"{stage}: ", "Read-only" if free == "read-only" else "disk")
    assert done.stdout == ""
    assert free in ("0", "8") or " of free disk for a GGUF" not in said  # a stage that had not begun to write
