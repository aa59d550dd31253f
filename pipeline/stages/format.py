"""Format: PubMedQA records -> chat messages, one JSONL file per split, and the statistics of the data.

The test split is the authors' list of PMIDs, never a re-split, so that scores stay comparable with the published ones
(Jin et al. 2019, https://arxiv.org/abs/1909.06146). Validation is drawn from the other questions, stratified by label;
every choice is made on it. Overlap between test and train is counted in word n-grams: 13 is lm-evaluation-harness's
choice and 8 GPT-3's lower bound (Brown et al. 2020, appendix C, https://arxiv.org/abs/2005.14165).
"""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field
from tqdm import tqdm

from pipeline.core.records import Record, is_text, read_json, read_object, read_text, write_csv, write_json, write_jsonl
from pipeline.core.stage import Fail, Section, run
from pipeline.scoring.protocols import LABELS, as_data, completion, lm_eval, prompt, question_only

LOOKS_SPECIAL = re.compile(r"<[|｜].*[|｜]>")  # noqa: RUF001  # llama.cpp's converter makes these control tokens
SPLITS = ("train", "validation", "test")
Example = dict[str, Any]  # pmid, label, prompt and completion as chat messages


class Params(Section):
    system_prompt: Annotated[str, Field(min_length=1)]
    validation_questions: Annotated[int, Field(gt=0)]
    seed: int


def read_by_pmid(path: Path) -> dict[str, Any]:
    """The JSON object in `path`: PMID -> what belongs to it."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise Fail(f"{path} is not a JSON object of PMIDs, as PubMedQA's file of that name is; correct it")
    return cast(dict[str, Any], value)


def problems(pmid: str, record: Any) -> list[str]:
    """What is wrong with a record, one short phrase each; empty if it can become an example."""
    if not isinstance(record, dict) or not is_text(pmid):
        return [f"PMID {pmid}: not a record"]
    found: list[str] = []
    if not re.fullmatch(r"[\w.-]+", pmid):  # tables of predictions are CSV without quotes
        found.append(f"PMID {pmid}: an identifier is made of letters, digits, '.', '-' and '_'")
    for field in ("QUESTION", "LONG_ANSWER"):
        if not is_text(record.get(field)) or not record[field].strip():
            found.append(f"PMID {pmid}: {field} is missing or empty")
    contexts: Any = record.get("CONTEXTS")
    labels: Any = record.get("LABELS")
    if not is_texts(contexts) or not contexts or not all(text.strip() for text in contexts):
        found.append(f"PMID {pmid}: CONTEXTS is missing or has an empty part")
    elif not is_texts(labels) or len(labels) != len(contexts):
        found.append(f"PMID {pmid}: LABELS must name each of the {len(contexts)} CONTEXTS")
    if record.get("final_decision") not in LABELS:
        found.append(f"PMID {pmid}: final_decision is not yes, no or maybe")
    return found


def is_texts(value: Any) -> bool:
    """Whether the value is a list of strings."""
    return isinstance(value, list) and all(is_text(item) for item in value)


def check_records(records: dict[str, Record], truth: dict[str, str]) -> None:
    """Raise `Fail` with the first of all problems in the records, the duplicates and the test list, and their count."""
    found = [problem for pmid, record in records.items() for problem in problems(pmid, record)]
    if not found:
        asked: dict[str, str] = {}
        for pmid, record in records.items():
            words = " ".join([record["QUESTION"], *record["CONTEXTS"]]).split()
            first = asked.setdefault(" ".join(words).lower(), pmid)
            if first != pmid:
                found.append(f"PMID {pmid}: the same question and abstract as PMID {first}")
        for pmid, label in truth.items():
            if pmid not in records:
                found.append(f"PMID {pmid}: in test_ground_truth.json but not in ori_pqal.json")
            elif records[pmid]["final_decision"] != label:
                found.append(f"PMID {pmid}: its final_decision differs from test_ground_truth.json")
    if not truth or len(truth) >= len(records):
        found.append(f"test_ground_truth.json lists {len(truth)} PMIDs of {len(records)} records")
    if found:
        raise Fail(f"data/raw: {found[0]} ({len(found)} problem{'s' * (len(found) > 1)} in all); correct the data")


def split(records: dict[str, Record], truth: dict[str, str], params: Params) -> dict[str, list[str]]:
    """PMIDs of each split, sorted: the official test list, then a stratified draw of the rest for validation."""
    rest = sorted(records.keys() - truth.keys())
    if params.validation_questions >= len(rest):
        raise Fail(
            f"params.yaml: format.validation_questions: only {len(rest)} questions are not in the test; lower it"
        )
    rng = random.Random(params.seed)
    by_label = {label: [pmid for pmid in rest if records[pmid]["final_decision"] == label] for label in LABELS}
    shares = {label: params.validation_questions * len(pmids) / len(rest) for label, pmids in by_label.items()}
    counts = {label: int(share) for label, share in shares.items()}
    # Largest remainders get what rounding down left, so that the counts add up to the number asked for.
    largest = sorted(LABELS, key=lambda label: counts[label] - shares[label])
    for label in largest[: params.validation_questions - sum(counts.values())]:
        counts[label] += 1
    validation = {pmid for label in LABELS for pmid in rng.sample(by_label[label], counts[label])}
    return {
        "train": [pmid for pmid in rest if pmid not in validation],
        "validation": sorted(validation),
        "test": sorted(truth),
    }


def texts_as_data(record: Record, control: list[str]) -> Record:
    """The record, its texts such that no tokenizer finds one of the `control` tokens in them."""
    texts = {field: as_data(record[field], control) for field in ("QUESTION", "LONG_ANSWER")}
    lists = {field: [as_data(text, control) for text in record[field]] for field in ("CONTEXTS", "LABELS")}
    return record | texts | lists


def example(pmid: str, record: Record, system_prompt: str) -> Example:
    """A line of the JSONL files: the prompt and the completion as chat messages."""
    return {
        "pmid": pmid,
        "label": record["final_decision"],
        "prompt": prompt(record, system_prompt),
        "completion": completion(record),
    }


def other_protocols(record: Record, system_prompt: str) -> Example:
    """What a line of test.jsonl holds besides: the same question as the other protocols ask it."""
    return {"lm_eval": lm_eval(record), "question_only": question_only(record, system_prompt)}


def ngrams(record: Record, n: int) -> set[tuple[str, ...]]:
    """The word n-grams of a record's question, abstract and conclusion, lower-cased, without punctuation."""
    words = re.findall(r"\w+", " ".join([record["QUESTION"], *record["CONTEXTS"], record["LONG_ANSWER"]]).lower())
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def overlap(test: list[Record], train: list[Record], n: int) -> int:
    """The number of test records that share a word n-gram with a training record."""
    seen = set[tuple[str, ...]]().union(*(ngrams(record, n) for record in train))
    return sum(not seen.isdisjoint(ngrams(record, n)) for record in test)


def control_tokens(base: Path) -> list[str]:
    """The names of the base's special tokens, such as `<|eot_id|>`, and of those that llama.cpp takes for such."""
    added = read_object(base / "tokenizer.json", "added_tokens")["added_tokens"]
    return [token["content"] for token in added if token["special"] or LOOKS_SPECIAL.fullmatch(token["content"])]


def token_counter(base: Path) -> Callable[[Example], int]:
    """A function that counts an example's tokens in the base's own chat template, special tokens included."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_file(str(base / "tokenizer.json"))
    except Exception:  # a bare Exception is what the library raises
        raise Fail(f"{base}/tokenizer.json is missing, truncated or no fast tokenizer; run `dvc repro base`") from None
    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(read_text(base / "chat_template.jinja"))
    except TemplateError as error:
        raise Fail(f"{base}/chat_template.jinja does not work ({error}); run `dvc repro base`") from None
    bos = read_object(base / "tokenizer_config.json").get("bos_token", "")

    def count(example: Example) -> int:
        text = template.render(messages=example["prompt"] + example["completion"], bos_token=bos)
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count


def statistics(labels: dict[str, list[str]], tokens: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """Questions, label counts and token lengths of each split, for metrics/format.json."""
    return {
        name: {
            "questions": len(labels[name]),
            **{label: labels[name].count(label) for label in LABELS},
            "tokens_mean": round(sum(tokens[name]) / len(tokens[name]), 1),
            "tokens_max": max(tokens[name]),
        }
        for name in SPLITS
    }


def add_artificial(records: dict[str, Record], extra: dict[str, Record]) -> list[str]:
    """Add PQA-A's records for training only; returns their PMIDs, raises `Fail` if one is in PQA-L."""
    if both := sorted(records.keys() & extra.keys()):
        raise Fail(
            f"data/raw/ori_pqaa.json: PMID {both[0]} is in ori_pqal.json too ({len(both)} in all); correct the data"
        )
    found = [problem for pmid, record in extra.items() for problem in problems(pmid, record)]
    if found:
        raise Fail(f"data/raw/ori_pqaa.json: {found[0]} ({len(found)} in all); correct the data")
    return sorted(extra)


def main(raw: Path, base: Path, formatted: Path, metrics: Path, label_balance: Path, token_lengths: Path) -> None:
    """Write FORMATTED/{train,validation,test}.jsonl and the statistics of the data."""
    params = Params.load("format")
    records: dict[str, Record] = read_by_pmid(raw / "ori_pqal.json")
    truth: dict[str, str] = read_by_pmid(raw / "test_ground_truth.json")
    check_records(records, truth)
    pmids = split(records, truth, params)
    if (artificial := raw / "ori_pqaa.json").is_file():
        extra: dict[str, Record] = read_by_pmid(artificial)
        pmids["train"] += add_artificial(records, extra)
        records = records | extra
    count, control = token_counter(base), control_tokens(base)
    records = {pmid: texts_as_data(record, control) for pmid, record in records.items()}
    splits = {name: [example(pmid, records[pmid], params.system_prompt) for pmid in pmids[name]] for name in SPLITS}
    for row in splits["test"]:
        row |= other_protocols(records[row["pmid"]], params.system_prompt)
    tokens = {name: [count(row) for row in tqdm(rows, desc=f"tokens {name}")] for name, rows in splits.items()}
    labels = {name: [row["label"] for row in rows] for name, rows in splits.items()}
    test, others = ([records[pmid] for name in names for pmid in pmids[name]] for names in (["test"], SPLITS[:2]))
    shared = {f"{n}_grams": overlap(test, others, n) for n in (8, 13)}
    for name, rows in splits.items():
        write_jsonl(formatted / f"{name}.jsonl", rows)
    write_json(metrics, {**statistics(labels, tokens), "test_overlap": shared})
    balance = ((name, label, labels[name].count(label)) for name in SPLITS for label in LABELS)
    write_csv(label_balance, ["split", "label", "questions"], balance)
    write_csv(token_lengths, ["split", "tokens"], ((name, n) for name in SPLITS for n in tokens[name]))


if __name__ == "__main__":
    run(main)
