"""Memory of the first phase: a generated parquet file of PQA-A's size and schema, from a local hub, and a few steps.

    python -m benchmarks.pretrain [--questions 211269]

Runs download, base, format, artificial and pretrain on the micro profile in a temporary copy of the project. The figure
is the largest anonymous memory of the processes of `artificial` and `pretrain`.
"""

import argparse
import io
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import LOGS, Watch, environment
from benchmarks.record import Figures, record
from pipeline.simulated.trials import records
from tests.conftest import copy_project, set_params, stages, yaml
from tests.hub import COMMIT, serve
from tests.stages.helpers import numbers

FILE = "pqa_artificial/train-00000-of-00001.parquet"
SCHEMA = pa.schema(
    {
        "pubid": pa.int32(),
        "question": pa.string(),
        "context": pa.struct({name: pa.list_(pa.string()) for name in ("contexts", "labels", "meshes")}),
        "long_answer": pa.string(),
        "final_decision": pa.string(),
    }
)
LABELS = ["BACKGROUND", "METHODS", "RESULTS"]


def table(count: int, rows: list[dict[str, Any]] | None = None, seed: int = 0) -> bytes:
    """A parquet file of `count` artificial questions of about 230 words, and `rows`, in groups of 1,000 rows."""
    rng = random.Random(seed)
    words = sorted(
        {word for row in records(1, 200, 20)[0].values() for text in row["CONTEXTS"] for word in text.split()}
    )
    sentences = [" ".join(rng.choices(words, k=15)).capitalize() + "." for _ in range(20_000)]
    target = io.BytesIO()
    with pq.ParquetWriter(target, SCHEMA) as writer:
        for start in range(0, count, 1000):
            made = [
                {
                    "pubid": 20_000_000 + number,
                    "question": f"Do {rng.choice(sentences)[:-1].lower()}?",
                    "context": {
                        "contexts": [" ".join(rng.choices(sentences, k=5)) for _ in LABELS],
                        "labels": LABELS,
                        "meshes": ["Humans"],
                    },
                    "long_answer": rng.choice(sentences),
                    "final_decision": "yes" if rng.random() < 0.928 else "no",
                }
                for number in range(start, min(start + 1000, count))
            ]
            writer.write_table(pa.Table.from_pylist(made + (rows or []) * (start == 0), SCHEMA))
    return target.getvalue()


def main() -> None:
    """Run the stages and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=211_269)
    arguments = parser.parse_args()
    text: list[str] = []
    peaks: dict[str, float] = {}
    with serve() as server, tempfile.TemporaryDirectory() as directory:
        server.add_data_set("local/artificial", FILE, table(arguments.questions))
        project = copy_project(Path(directory, "project"))
        training = yaml.load((project / "params.yaml").read_text())["train"]
        set_params(
            project, "pretrain", source="hub", repo_id="local/artificial", revision=COMMIT, file=FILE, **training
        )
        given = environment(HF_ENDPOINT=server.url, HF_HOME=str(Path(directory, "hub")))
        for stage in ("download", "base", "format", "artificial", "pretrain"):
            at = time.monotonic()
            process = subprocess.Popen(stages(project)[stage]["cmd"], shell=True, cwd=project, env=given)
            watch = Watch(process.pid)
            if process.wait():
                sys.exit(f"pretrain: the stage {stage} failed; its last lines are above")
            watch.stop()
            peaks[stage] = watch.peak_anon.get("start", 0) / 2**30
            text.append(f"{stage}: {time.monotonic() - at:.0f} s, {peaks[stage]:.2f} GiB of anonymous memory")
        text.append(f"rows: {numbers(project / 'metrics' / 'artificial.json')}")
    figures: Figures = {"pretrain.peak_anon_gib": (round(max(peaks["artificial"], peaks["pretrain"]), 2), "GiB")}
    command = f"python -m benchmarks.pretrain --questions {arguments.questions}"
    record(figures, command, LOGS / "pretrain.log", text="\n".join(text))


if __name__ == "__main__":
    main()
