"""What it costs to start: each command's help, a `dvc repro` with nothing to do, and reading a GGUF's header.

`python -m benchmarks.startup`, after `dvc repro`. Each figure is a ratio of medians, measured in turn in one run.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gguf
import numpy as np

from benchmarks.record import HERE, record
from pipeline.models.gguf_header import read_metadata

ROOT = HERE.parent
LOG = HERE / "logs" / "startup.log"
TIMES = 7
LIBRARIES = "import typer, ruamel.yaml; from pydantic import BaseModel"  # pydantic alone loads nothing
VOCABULARY, MERGES = 128_256, 280_147  # Llama 3's


def run(*arguments: str) -> Callable[[], None]:
    """A run of this Python with `arguments`, its output dropped."""
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True) and None


def write_vocabulary(path: Path) -> None:
    """A GGUF of one small tensor with as many tokens and merges as Llama 3 has."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{i}" for i in range(VOCABULARY)])
    writer.add_token_merges([f"a{i} b{i}" for i in range(MERGES)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_tensor("weight", np.zeros((4, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds(actions: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """The median time of each, all of them in turn `times` times."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(times):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            found[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in found.items()}


def main() -> None:
    commands = [
        path.stem for path in sorted((ROOT / "pipeline").glob("*.py")) if "\n    run(main)\n" in path.read_text()
    ]
    helps = seconds(
        {"": run("-c", LIBRARIES), **{name: run("-m", f"pipeline.{name}", "--help") for name in commands}}, TIMES
    )
    noop = seconds({"repro": run("-m", "dvc", "repro"), "status": run("-m", "dvc", "status")}, TIMES)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "vocabulary.gguf")
        write_vocabulary(path)
        header = seconds({"ours": lambda: read_metadata(path), "library": lambda: gguf.GGUFReader(path)}, 3)
    LOG.write_text(
        "\n".join(
            f"{group} {name or 'libraries alone'}: {value:.3f} s"
            for group, values in {"help": helps, "dvc": noop, "header": header}.items()
            for name, value in values.items()
        )
        + "\n",
        encoding="utf-8",
    )
    figures = {f"startup.{name}.time_over_libraries": (round(helps[name] / helps[""], 2), "") for name in commands}
    figures["repro.noop.time_over_status"] = (round(noop["repro"] / noop["status"], 2), "")
    figures["header.time_over_gguf_library"] = (round(header["ours"] / header["library"], 4), "Llama 3's vocabulary")
    record(figures, "python -m benchmarks.startup", LOG)
    print(LOG.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
