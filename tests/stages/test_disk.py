"""A disk that is full or read-only ends a stage with one sentence, and leaves every output as it was."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import run_command, stages, tried

# In a mount namespace: a small file system with the project on it, filled up or read-only; then the stage.
SCRIPT = """
set -e
mount -t tmpfs -o size=96m none "$DISK"
cp -a "$PROJECT" "$DISK/project"
cd "$DISK/project"
list() { find data models metrics -type f ! -name '*_resources.json' ! -name train_memory.csv | sort; }
list | xargs sha256sum > /dev/shm/before.$$
if [ "$FREE" = read-only ]; then
    mount -o remount,ro "$DISK"
else
    fallocate -l $(( ($(df --output=avail -k . | tail -1) - FREE) * 1024 )) "$DISK/filler"
fi
set +e
PYTHONDONTWRITEBYTECODE=1 $COMMAND > /dev/null
status=$?
find data models metrics .checkpoints -name '*.partial' 2> /dev/null | sed 's/^/left over: /'
list | xargs sha256sum | cmp - /dev/shm/before.$$
rm /dev/shm/before.$$
exit $status
"""
possible = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
slow = pytest.mark.slow


@pytest.mark.skipif(not possible, reason="this machine lends no mount namespace")
@pytest.mark.parametrize("free", ["0", "8", "read-only"])  # KiB: all that evaluate writes on micro fits into 16
@pytest.mark.parametrize(
    "stage",
    [
        "download",
        "format",
        "report",
        *(
            pytest.param(stage, marks=slow)
            for stage in ("base", "train", "merge", "quantize", "evaluate", "reference", "baseline")
        ),
    ],
)
def test_a_full_or_read_only_disk(micro: Path, tmp_path: Path, stage: str, free: str):
    (tmp_path / "disk").mkdir()
    (tmp_path / "script").write_text(SCRIPT)
    command = stages(micro)[stage]["cmd"]
    names = {"DISK": str(tmp_path / "disk"), "PROJECT": str(micro), "FREE": free, "COMMAND": command}
    fault = f"{stage}: {'a read-only disk' if free == 'read-only' else f'a disk with {free} KiB left'}"
    with tried("disk", fault) as seen:
        result = run_command(tmp_path, "unshare -rm sh script", **names)
        assert result.returncode == 1, result.stdout + result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        seen.append(result.stderr.splitlines()[-1])
        assert seen[0].startswith(f"{stage}: ")
        assert ("Read-only" if free == "read-only" else "disk") in seen[0]
