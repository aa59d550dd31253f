"""What a command and its children cost while they run: anonymous memory, and the disk that some directories take."""

import os
import threading
from pathlib import Path

INTERVAL = 0.1  # seconds between two looks at memory; a look at the disk comes with every tenth


def anonymous_memory(root: int) -> int:
    """Bytes of RssAnon of the process `root` or of the largest of its descendants; mapped files are not in it."""
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


def disk_usage(directories: list[Path]) -> int:
    """Bytes that files take on disk; a file with several links counts once."""
    seen: dict[tuple[int, int], int] = {}
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                try:
                    found = Path(folder, name).lstat()
                except OSError:
                    continue
                seen[found.st_dev, found.st_ino] = 512 * found.st_blocks
    return sum(seen.values())


class Watch:
    """Peaks of memory and disk by phase, sampled in a thread; set `phase` as the command goes on."""

    def __init__(self, pid: int, directories: list[Path], phase: str = "start") -> None:
        self.pid, self.directories, self.phase = pid, directories, phase
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
            if count % 10 == 0:
                self.peak_disk[phase] = max(self.peak_disk.get(phase, 0), disk_usage(self.directories))
            count += 1

    def stop(self) -> None:
        self.done.set()
        self.thread.join()
