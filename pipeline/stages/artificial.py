"""Artificial: PubMedQA's artificial questions (PQA-A) -> examples for the stage `pretrain`.

PQA-A (Jin et al. 2019, https://arxiv.org/abs/1909.06146) has 211,269 questions that were made from titles of papers.
They are read from the hub's parquet file batch by batch and written one by one, so that memory does not grow with
their number. A question that shares its PMID, or 13 words in a row of question or abstract, with a test question is
left out.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.dataset import read_dataset
from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.files import read_as, read_text, sha256
from pipeline.core.outputs import write_json
from pipeline.core.params import load_params
from pipeline.core.record import Record, parse_record
from pipeline.core.rows import write_rows
from pipeline.core.source import Source
from pipeline.core.usage import Usage
from pipeline.models.chat import control_tokens, read_template
from pipeline.models.encoder import Encoder
from pipeline.models.hub import from_hub
from pipeline.scoring.examples import as_example, ngrams, without_control_tokens
from pipeline.sections.pretrain import PRETRAIN, Pretrain

N = 13  # words in a row: lm-evaluation-harness's choice
ROWS = 512  # of a batch
COUNTS = ("questions", "unusable", "same_pmid", "same_13_words", "too_long", "examples")


def fetch(params: Pretrain) -> Path:
    """The parquet file in the hub's cache, downloaded where missing; raises `Fail`."""
    from huggingface_hub import hf_hub_download

    about = {"revision": params.revision, "repo_type": "dataset", "filename": params.file}
    path = Path(from_hub("pretrain", hf_hub_download, params.repo_id, **about)).resolve()
    # The cache names a large file by the sha256 that the hub gives.
    if re.fullmatch("[0-9a-f]{64}", path.name) and sha256(path) != path.name:
        raise Fail(f"{path} differs from the hub's file; remove it and run `dvc repro`")
    return path


def read_records(path: Path, counts: Counter[str]) -> Iterator[tuple[str, Record]]:
    """PMID and record of each usable row; raises `Fail` if the file is no parquet file of PQA-A's schema."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    columns = ["pubid", "question", "context", "long_answer", "final_decision"]
    try:
        with ParquetFile(path, pre_buffer=False) as file:
            batches = file.iter_batches(ROWS, columns=columns, use_threads=False)
            for row in tqdm((row for batch in batches for row in batch.to_pylist()), total=file.metadata.num_rows):
                counts["questions"] += 1
                pmid, record = str(row["pubid"]), parse_record(str(row["pubid"]), as_record(row))[0]
                if record:
                    yield pmid, record
                else:
                    counts["unusable"] += 1
    except (pyarrow.ArrowException, OSError, KeyError, TypeError) as error:
        raise Fail(
            f"params.yaml: pretrain.file: not a parquet file with PQA-A's columns ({type(error).__name__}); correct "
            "it, then run `dvc repro`"
        ) from None


def as_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the schema of PQA-L; of the context only sections and their names."""
    return {
        "QUESTION": row["question"],
        "CONTEXTS": row["context"]["contexts"],
        "LABELS": row["context"]["labels"],
        "LONG_ANSWER": row["long_answer"],
        "final_decision": row["final_decision"],
    }


def examples(
    records: Iterator[tuple[str, Record]],
    test: dict[str, Record],
    base: Path,
    system_prompt: str,
    max_length: int,
    counts: Counter[str],
) -> Iterator[Example]:
    """The examples that share nothing with the test questions, the others counted; raises `Fail` if none is left."""
    template, encoder, control = read_template(base), Encoder(base), control_tokens(base)
    asked = set[tuple[str, ...]]().union(*(ngrams([row.question, *row.contexts], N) for row in test.values()))
    for pmid, record in records:
        if pmid in test:
            counts["same_pmid"] += 1
        elif not asked.isdisjoint(ngrams([record.question, *record.contexts], N)):
            counts["same_13_words"] += 1
        else:
            example = as_example(pmid, without_control_tokens(record, control), system_prompt, template, encoder)
            if len(example.input_ids) > max_length:
                counts["too_long"] += 1
            else:
                counts["examples"] += 1
                yield example.model_copy(update={"text": ""})  # which only the text baselines read
    if not counts["examples"]:
        raise Fail(f"params.yaml: pretrain.file: none of its {counts['questions']} questions is usable; choose another")


def main(raw: Path, base: Path, system_prompt: Path, output: Path, metrics: Path, resources: Path) -> None:
    """Write OUTPUT, one example a line, and METRICS: what was left out. Empty and zero without a first phase."""
    usage = Usage()
    params = load_params("pretrain", PRETRAIN)
    counts: Counter[str] = Counter()
    rows: Iterator[Example] = iter(())
    if isinstance(params, Pretrain):
        source = read_as(Source, raw / "source.json")
        files = raw / "ori_pqal.json", raw / "test_ground_truth.json"
        dataset = read_dataset(*files, source.records, source.test_ground_truth)
        test = {pmid: dataset.records[pmid] for pmid in dataset.test}
        records = read_records(fetch(params), counts)
        rows = examples(records, test, base, read_text(system_prompt), params.max_length, counts)
    write_rows(output, rows)
    write_json(metrics, {name: counts[name] for name in COUNTS})
    write_json(resources, usage.figures())
