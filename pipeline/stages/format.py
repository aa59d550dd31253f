"""Format: PubMedQA records -> examples and questions, one JSONL file per split, and the statistics of the data.

The test split is the authors' list of PMIDs, never a re-split, so that scores are comparable with published ones (Jin
et al. 2019, https://arxiv.org/abs/1909.06146). Validation is drawn from the other questions, stratified by label; every
choice is made on it. Overlap between test and training is counted in word n-grams: 13 is lm-evaluation-harness's choice
and 8 GPT-3's lower bound (Brown et al. 2020, appendix C, https://arxiv.org/abs/2005.14165).
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.dataset import read_dataset
from pipeline.core.errors import Fail
from pipeline.core.example import Example
from pipeline.core.facts import Conclusion, QuestionFacts
from pipeline.core.files import read_as
from pipeline.core.json_files import read_json_object
from pipeline.core.labels import LABELS
from pipeline.core.outputs import write_csv, write_json, writing
from pipeline.core.params import load_params
from pipeline.core.record import Record
from pipeline.core.rows import write_rows
from pipeline.core.source import Source
from pipeline.models.chat import DATE, control_tokens, read_template
from pipeline.models.encoder import Encoder
from pipeline.scoring.examples import as_example, ngrams, without_control_tokens
from pipeline.scoring.protocols import as_question
from pipeline.sections.evaluate import Evaluate, Reference
from pipeline.sections.format import Format
from pipeline.sections.generate import Generate
from pipeline.sections.train import Train

SPLITS = ("train", "validation", "test")
NUMERIC = re.compile(r"\d\s?%|\d[.·]\d|±|\bp\s?[<>=≤≥]", re.IGNORECASE)  # a percentage, a decimal, ±, a p-value


def split(records: dict[str, Record], test: set[str], params: Format) -> dict[str, list[str]]:
    """PMIDs of each split, sorted: the official test list, then a stratified draw of the rest for validation.

    Where records have groups, validation has whole groups, and so possibly fewer questions than asked for.
    """
    rest = sorted(records.keys() - test)
    if params.validation_questions >= len(rest):
        raise Fail(
            f"params.yaml: format.validation_questions: only {len(rest)} questions are not in the test; lower it"
        )
    rng = random.Random(params.seed)
    by_label = {label: [pmid for pmid in rest if records[pmid].final_decision == label] for label in LABELS}
    shares = {label: params.validation_questions * len(pmids) / len(rest) for label, pmids in by_label.items()}
    counts = {label: int(share) for label, share in shares.items()}
    # The largest remainders get what rounding down left, so that the counts add up to the number asked for.
    largest = sorted(LABELS, key=lambda label: counts[label] - shares[label])
    for label in largest[: params.validation_questions - sum(counts.values())]:
        counts[label] += 1
    if any(records[pmid].group for pmid in rest):
        validation = draw_groups({pmid: records[pmid] for pmid in rest}, counts, rng)
    else:
        validation = {pmid for label in LABELS for pmid in rng.sample(by_label[label], counts[label])}
    return {
        "train": [pmid for pmid in rest if pmid not in validation],
        "validation": sorted(validation),
        "test": sorted(test),
    }


def draw_groups(records: dict[str, Record], counts: Mapping[str, int], rng: random.Random) -> set[str]:
    """PMIDs of whole groups, drawn while no label exceeds its count: at most as many as `counts` says."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for pmid, record in records.items():  # a record without a group is one of its own
        groups.setdefault((record.group is None, record.group or pmid), []).append(pmid)
    left, drawn = Counter(counts), set[str]()
    for key in rng.sample(sorted(groups), len(groups)):
        labels = Counter(records[pmid].final_decision for pmid in groups[key])
        if labels <= left:
            left -= labels
            drawn |= set(groups[key])
    if not drawn:
        raise Fail(
            f"params.yaml: format.validation_questions: no group of questions is as small as {sum(counts.values())} "
            "with these shares of answers; raise it"
        )
    return drawn


def overlap(test: list[Record], train: list[Record], n: int) -> int:
    """The number of test records that share a word n-gram with a training record."""
    parts, of_test = ([[row.question, *row.contexts, row.long_answer] for row in rows] for rows in (train, test))
    seen = set[tuple[str, ...]]().union(*(ngrams(texts, n) for texts in parts))
    return sum(not seen.isdisjoint(ngrams(texts, n)) for texts in of_test)


def context_length(base: Path) -> int | None:
    """The longest sequence that the base's configuration supports, in tokens; None if it does not say."""
    value = read_json_object(base / "config.json").get("max_position_embeddings")
    return value if isinstance(value, int) else None


def check_lengths(examples: dict[str, list[Example]], base: Path) -> None:
    """Raise `Fail` naming every limit that an example exceeds: other stages would refuse it much later."""
    limits = {"evaluate": (load_params("evaluate", Evaluate).n_ctx, load_params("evaluate", Evaluate).max_new_tokens)}
    optional = {"reference": load_params("reference", Reference), "generate": load_params("generate", Generate)}
    limits |= {name: (stage.n_ctx, stage.max_new_tokens) for name, stage in optional.items() if stage.enabled}
    whole = {row.pmid: len(row.input_ids) for row in examples["train"] + examples["validation"]}
    found = [too_long("train.max_length", load_params("train", Train).max_length, whole)]
    for section, (n_ctx, answer) in limits.items():
        asked = {row.pmid: row.prompt_tokens + answer - 1 for row in examples["test"]}
        if section == "evaluate":  # `baseline` asks the validation questions too, for one token each
            asked |= {row.pmid: row.prompt_tokens for row in examples["validation"]}
        found.append(too_long(f"{section}.n_ctx", n_ctx, asked))
    if context := context_length(base):
        longest = {**whole, **{row.pmid: len(row.input_ids) for row in examples["test"]}}
        found.append(too_long("the base's context", context, longest, "shorten these questions or choose another base"))
    if problems := [problem for problem in found if problem]:
        raise Fail("; ".join(problems))


def too_long(limit: str, tokens: int, lengths: dict[str, int], remedy: str = "") -> str:
    """The sentence for the lengths above `tokens`, by PMID; empty if there is none."""
    long = {pmid: length for pmid, length in lengths.items() if length > tokens}
    if not long:
        return ""
    worst = max(long, key=lambda pmid: long[pmid])
    remedy = remedy or f"raise it in params.yaml to {long[worst]}, or shorten these questions"
    shown = ", ".join(sorted(long)[:10]) + (", ..." if len(long) > 10 else "")
    return f"{limit} is {tokens} tokens and {len(long)} questions need up to {long[worst]} (PMID {shown}): {remedy}"


def facts_of(pmid: str, record: Record) -> QuestionFacts:
    """What the slices of the test questions are made by."""
    abstract = " ".join(record.contexts)
    return QuestionFacts(
        pmid=pmid,
        year=record.year,
        abstract_words=len(abstract.split()),
        numeric_results=bool(NUMERIC.search(abstract)),
    )


def statistics(records: Sequence[Record], examples: Sequence[Example]) -> dict[str, float]:
    """Questions, label counts and token lengths of a split, for metrics/format.json."""
    labels = [record.final_decision for record in records]
    tokens = [len(example.input_ids) for example in examples]
    return {
        "questions": len(labels),
        **{label: labels.count(label) for label in LABELS},
        "tokens_mean": round(sum(tokens) / len(tokens), 1),
        "tokens_max": max(tokens),
    }


def main(raw: Path, base: Path, formatted: Path, metrics: Path, label_balance: Path, token_lengths: Path) -> None:
    """Write what the stages after it read into FORMATTED, and the statistics of the data."""
    params = load_params("format", Format)
    source = read_as(Source, raw / "source.json")
    files = raw / "ori_pqal.json", raw / "test_ground_truth.json"
    dataset = read_dataset(*files, source.records, source.test_ground_truth)
    pmids = split(dataset.records, dataset.test, params)
    template, encoder, control = read_template(base), Encoder(base), control_tokens(base)
    records = {pmid: without_control_tokens(record, control) for pmid, record in dataset.records.items()}
    examples = {
        name: [
            as_example(pmid, records[pmid], params.system_prompt, template, encoder)
            for pmid in tqdm(pmids[name], desc=f"tokens {name}")
        ]
        for name in SPLITS
    }
    check_lengths(examples, base)
    by_split = {name: [records[pmid] for pmid in pmids[name]] for name in SPLITS}
    others = by_split["train"] + by_split["validation"]
    shared = {f"{n}_grams": overlap(by_split["test"], others, n) for n in (8, 13)}
    write_rows(formatted / "train.jsonl", examples["train"])
    write_rows(formatted / "validation.jsonl", examples["validation"])
    for name, asked in (("validation_questions", "validation"), ("test", "test")):
        questions = (as_question(pmid, records[pmid], params.system_prompt) for pmid in pmids[asked])
        write_rows(formatted / f"{name}.jsonl", questions)
    write_rows(formatted / "test_facts.jsonl", (facts_of(pmid, records[pmid]) for pmid in pmids["test"]))
    conclusions = (Conclusion(pmid=pmid, long_answer=records[pmid].long_answer) for pmid in pmids["test"])
    write_rows(formatted / "conclusions.jsonl", conclusions)
    with writing(formatted / "system_prompt.txt") as partial:
        partial.write_text(params.system_prompt, encoding="utf-8")
    figures: dict[str, Any] = {name: statistics(by_split[name], examples[name]) for name in SPLITS}
    write_json(metrics, {**figures, "test_overlap": shared, "chat_date": DATE.isoformat()})
    counts = ((name, label, int(figures[name][label])) for name in SPLITS for label in LABELS)
    write_csv(label_balance, ["split", "label", "questions"], counts)
    lengths = ((name, len(example.input_ids)) for name in SPLITS for example in examples[name])
    write_csv(token_lengths, ["split", "tokens"], lengths)
