"""The machine that measures, and what a command costs on it: time, anonymous memory and disk."""

import os
import platform
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
ROOT, RESULTS, LOGS = HERE.parent, HERE / "results.json", HERE / "logs"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "llama-cpp-python", "dvc")
INTERVAL = 0.1  # seconds between samples of memory; the disk is sampled at every tenth


def card() -> str:
    """Name, memory and driver of the first CUDA card, or nothing."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return (subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() or [""])[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def hardware() -> str:
    """CPU, number of cores and memory; the card where there is one."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    kib = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    parts = [card(), cpu, f"{len(os.sched_getaffinity(0))} cores", f"{kib / 2**20:.0f} GiB"]
    return ", ".join(filter(None, parts))


def versions() -> dict[str, str]:
    """The versions of Python and of the installed ones of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(**more: str) -> dict[str, str]:
    """This process's environment with its own interpreter first on PATH, as stages start `python3`."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | more


def anonymous_memory(root: int) -> int:
    """Bytes of anonymous memory of the process `root` or of its largest descendant; mapped files do not count."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        except OSError:  # it has ended
            continue
        pid = int(fields["Pid"])
        parents[pid] = int(fields["PPid"])
        sizes[pid] = 1024 * int(fields.get("RssAnon", "0 kB").split()[0])

    def descends(pid: int) -> bool:
        while pid not in (0, root):
            pid = parents.get(pid, 0)
        return pid == root

    return max((size for pid, size in sizes.items() if descends(pid)), default=0)


def disk_usage(directory: Path) -> int:
    """Bytes that the files of a directory take on disk; a file with several links counts once."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                found = Path(folder, name).lstat()
            except OSError:
                continue
            seen[found.st_dev, found.st_ino] = 512 * found.st_blocks
    return sum(seen.values())


class Watch:
    """Peaks of memory, and of disk in `directory`, by phase, sampled in a thread; set `phase` as the command runs."""

    def __init__(self, pid: int, directory: Path | None = None) -> None:
        self.pid, self.directory, self.phase = pid, directory, "start"
        self.peak_anon: dict[str, int] = {}
        self.peak_disk: dict[str, int] = {}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        count = 0
        while not self.done.wait(INTERVAL):
            phase = self.phase
            self.peak_anon[phase] = max(self.peak_anon.get(phase, 0), anonymous_memory(self.pid))
            if self.directory and count % 10 == 0:
                self.peak_disk[phase] = max(self.peak_disk.get(phase, 0), disk_usage(self.directory))
            count += 1

    def stop(self) -> None:
        self.done.set()
        self.thread.join()
