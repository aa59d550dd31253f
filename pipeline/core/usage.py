"""What a stage costs: wall time and memory, for metrics/<stage>_resources.json. No stage reads these files."""

import resource
import time


class Usage:
    """Time and memory since construction."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Wall seconds, and the peak resident memory in MiB of this process or of its largest child."""
        own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "seconds": round(time.perf_counter() - self.start, 2),
            "peak_rss_mib": round(max(own, children) / 1024, 1),
        }
