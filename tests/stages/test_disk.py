"""A disk that is full or read-only ends a stage with one sentence, and leaves every output as it was."""

from pathlib import Path

import pytest

from tests.conftest import lends, run_command, stages, tried

# In a mount namespace: a small file system with the project on it, filled up or read-only; then the stage. With WHEN it
# is filled once the stage has started llama.cpp's converter, which is after it has seen that there is room.
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
    while [ -d /proc/$stage ] && [ -z "$(cat /proc/$stage/task/$stage/children)" ]; do sleep 0.01; done
    fill
fi
wait $stage
status=$?
find data models metrics .checkpoints -name '*.partial' 2> /dev/null | sed 's/^/left over: /'
list | xargs sha256sum | cmp - /dev/shm/before.$$
rm /dev/shm/before.$$
exit $status
"""
possible = lends("unshare -rm")
SLOW = ("base", "train", "merge", "quantize", "evaluate", "reference", "baseline")
STAGES = ("download", "format", "report", *SLOW)
# KiB of free disk that end in the middle of what a stage writes at length on micro, found by trial.
LONG = [
    ("download", 40, "the questions"),
    ("format", 40, "the test questions"),
    ("report", 500, "the pictures"),
    ("base", 900, "the weights"),
    ("train", 100, "a checkpoint's adapter"),
    ("train", 600, "a checkpoint's optimizer"),
    ("merge", 900, "the weights"),
    ("quantize", 2400, "the quantized GGUF"),
    ("evaluate", 16, "the table, after a whole journal"),
    ("baseline", 2400, "the quantized GGUF"),
]
CASES = [
    *((stage, free, f"a disk with {free} KiB left", "") for stage in STAGES for free in ("0", "8")),
    *((stage, "read-only", "a read-only disk", "") for stage in STAGES),
    *((stage, str(free), f"a disk that is full in the middle of {what}", "") for stage, free, what in LONG),
    *(
        (stage, "900", "a disk that is full in the middle of the 16-bit GGUF", "the converter runs")
        for stage in ("quantize", "reference", "baseline")
    ),
]


@pytest.mark.skipif(not possible, reason="this machine lends no mount namespace")
@pytest.mark.parametrize(
    ("stage", "free", "what", "when"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else (), id=f"{case[0]}: {case[2]}")
        for case in CASES
    ],
)
def test_a_full_or_read_only_disk(micro: Path, tmp_path: Path, stage: str, free: str, what: str, when: str):
    (tmp_path / "disk").mkdir()
    (tmp_path / "script").write_text(SCRIPT)
    names = {"DISK": str(tmp_path / "disk"), "PROJECT": str(micro), "FREE": free, "WHEN": when}
    with tried("disk", f"{stage}: {what}") as seen:
        result = run_command(tmp_path, "unshare -rm sh script", COMMAND=stages(micro)[stage]["cmd"], **names)
        assert result.returncode == 1, result.stdout + result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        seen.append(result.stderr.splitlines()[-1])
        assert seen[0].startswith(f"{stage}: ")
        assert ("Read-only" if free == "read-only" else "disk") in seen[0]
        assert free in ("0", "8") or "are needed" not in seen[0]  # a stage that had not begun to write
