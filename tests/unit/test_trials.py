"""The simulated trials are fair and repeatable, and the shipped tiny base is a Llama 3 in all but size."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.dataset import read_dataset
from pipeline.core.outputs import write_json
from pipeline.models.chat import read_template
from pipeline.models.directory import TINY_BASE
from pipeline.models.encoder import Encoder
from pipeline.simulated.trials import SEEN, UNSEEN, Wording, records

Records = dict[str, dict[str, Any]]
EVERYTHING, TEST = records(1, 500, 500)
TRAIN = {pmid: record for pmid, record in EVERYTHING.items() if pmid not in TEST}


def words(record: Any) -> str:
    return " ".join([*record["CONTEXTS"], record["QUESTION"]]).lower()


def test_the_same_seed_gives_the_same_trials():
    assert records(1, 500, 500) == (EVERYTHING, TEST)
    assert records(2, 500, 500)[0] != EVERYTHING


def test_trials_are_valid_records_of_pqa_l_under_numbers_that_no_paper_has(tmp_path: Path):
    for name, value in (("records", EVERYTHING), ("truth", TEST)):
        write_json(tmp_path / name, value)
    dataset = read_dataset(tmp_path / "records", tmp_path / "truth", "records", "truth")
    assert (len(dataset.records), dataset.test) == (1000, set(TEST))
    assert all(re.fullmatch(r"9\d{8}", pmid) for pmid in dataset.records)  # a real PMID has eight digits
    assert not any(record.long_answer in " ".join(record.contexts) for record in dataset.records.values())


@pytest.mark.parametrize("part", [TRAIN, {pmid: EVERYTHING[pmid] for pmid in TEST}], ids=["training", "test"])
def test_the_labels_are_as_frequent_as_pubmedqas(part: Records):
    assert Counter(record["final_decision"] for record in part.values()) == {"yes": 276, "no": 169, "maybe": 55}


def names(wording: Wording) -> set[str]:
    """Every treatment, comparator, outcome and patient group of one side of the split."""
    treatments = {stem + ending for stem in wording.stems for ending in wording.endings}
    outcomes = {f"{site} {symptom}" for site in wording.sites for symptom in wording.symptoms}
    return treatments | outcomes | set(wording.comparators) | set(wording.patients)


def templates(wording: Wording) -> set[str]:
    """Every sentence pattern of one side of the split."""
    groups = [*wording.designs.values(), *wording.conclusions.values(), wording.aims, wording.sizes, wording.durations]
    groups += [wording.doses, wording.results, wording.others, wording.reports, wording.asides, wording.questions]
    return {template for group in groups for template in group}


def test_the_test_half_shares_no_name_and_no_wording_with_the_training_half():
    seen, test = ("\n".join(map(words, part)) for part in (TRAIN.values(), map(EVERYTHING.get, TEST)))
    found = {name for name in names(UNSEEN) if re.search(rf"\b{name}\b", test)}
    assert (found, {name for name in found if re.search(rf"\b{name}\b", seen)}) == (names(UNSEEN), set())
    assert not templates(SEEN) & templates(UNSEEN)


ENCODER = Encoder(TINY_BASE)


@pytest.mark.parametrize(
    "word", [f"{space}{word}" for space in ("", " ") for word in "yes no maybe Yes No Maybe".split()]
)
def test_a_label_is_one_token_of_the_tiny_base(word: str):
    assert len(ENCODER.ids(word)) == 1


def test_the_tiny_base_has_llama_3s_template_special_tokens_and_groups_of_digits():
    chat = read_template(TINY_BASE).render([{"role": "user", "content": "Is it?"}], "Yes. It is.")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    prompt = f"<|begin_of_text|>{head.format('user')}Is it?<|eot_id|>{head.format('assistant')}"
    assert chat == (prompt, "Yes. It is.", "<|eot_id|>")
    assert ENCODER.tokenizer.encode("0.013", add_special_tokens=False).tokens == ["0", ".", "01", "3"]


def test_the_tiny_base_has_rows_for_k_quants():
    from safetensors import safe_open

    [path] = TINY_BASE.glob("*.safetensors")
    with safe_open(path, "np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    assert all(shape[1] % 256 == 0 for shape in shapes if len(shape) == 2)
    assert path.stat().st_size < 6_000_000
