"""The simulated trials are fair and repeatable, and the tiny base is a small Llama 3 in everything but size."""

import re
from collections import Counter
from pathlib import Path

import pytest

from pipeline.core.records import sha256
from pipeline.simulated.tiny import Tiny, build, encode
from pipeline.simulated.tokenizer import CHAT_TEMPLATE, WHOLE_WORDS, train_tokenizer
from pipeline.simulated.trials import SEEN, TURNS, UNSEEN, Wording, conversations, records

MICRO = Tiny(
    source="tiny",
    seed=1,
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    conversations=40,
    max_steps=3,
    per_device_train_batch_size=2,
    learning_rate=3e-3,
)
EVERYTHING, TEST = records(1, 500, 500)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([message["content"] for chat in conversations(1, 300) for message in chat], 1024)


def test_same_seed_same_trials():
    assert records(1, 500, 500) == (EVERYTHING, TEST)
    assert records(2, 500, 500)[0] != EVERYTHING
    assert conversations(3, 5) == conversations(3, 5)
    assert conversations(3, 5) != conversations(4, 5)


def test_schema_of_pqal():
    fields = ["QUESTION", "CONTEXTS", "LABELS", "MESHES", "YEAR", "reasoning_required_pred", "reasoning_free_pred"]
    assert len(EVERYTHING) == 1000
    for pmid, record in EVERYTHING.items():
        assert re.fullmatch(r"9\d{8}", pmid)  # a real PMID has eight digits
        assert list(record) == [*fields, "final_decision", "LONG_ANSWER"]
        assert len(record["CONTEXTS"]) == len(record["LABELS"]) > 1
        assert "Simulated Trial" in record["MESHES"]
        assert record["LONG_ANSWER"] not in " ".join(record["CONTEXTS"])
    assert len({" ".join(record["CONTEXTS"]) for record in EVERYTHING.values()}) == 1000


def test_class_balance_is_pubmedqas():
    assert Counter(TEST.values()) == {"yes": 276, "no": 169, "maybe": 55}
    train = Counter(record["final_decision"] for pmid, record in EVERYTHING.items() if pmid not in TEST)
    assert train == {"yes": 276, "no": 169, "maybe": 55}
    assert {pmid: record["final_decision"] for pmid, record in EVERYTHING.items() if pmid in TEST} == TEST


def templates(wording: Wording) -> set[str]:
    """Every sentence pattern of one side of the split."""
    groups = [*wording.designs.values(), *wording.conclusions.values(), wording.aims, wording.sizes, wording.durations]
    groups += [wording.doses, wording.results, wording.others, wording.reports, wording.asides, wording.questions]
    return {template for group in groups for template in group}


def names(wording: Wording) -> set[str]:
    """Every treatment, comparator, outcome and patient group of one side of the split."""
    treatments = {stem + ending for stem in wording.stems for ending in wording.endings}
    outcomes = {f"{site} {symptom}" for site in wording.sites for symptom in wording.symptoms}
    return treatments | outcomes | set(wording.comparators) | set(wording.patients)


def test_test_split_shares_no_name_and_no_wording_with_train_or_pretraining():
    assert not templates(SEEN) & templates(UNSEEN)
    for part in ("stems", "endings", "sites", "symptoms"):
        assert not set(getattr(SEEN, part)) & set(getattr(UNSEEN, part))
    train = [" ".join([*r["CONTEXTS"], r["QUESTION"]]) for pmid, r in EVERYTHING.items() if pmid not in TEST]
    chats = [message["content"] for chat in conversations(1, 500) for message in chat]
    seen = "\n".join([*train, *chats]).lower()
    test = "\n".join(
        " ".join([*r["CONTEXTS"], r["QUESTION"]]) for pmid, r in EVERYTHING.items() if pmid in TEST
    ).lower()
    for name in names(UNSEEN):
        assert re.search(rf"\b{name}\b", test), name
        assert not re.search(rf"\b{name}\b", seen), name
    # A pattern without its names: no sentence of the one side can be written by the other.
    literal = [max(re.split(r"\{\w+\}", template), key=len).lower().strip() for template in templates(UNSEEN)]
    assert sum(part in seen for part in literal) <= len(literal) * 0.25  # short connectives such as 'was'


def test_pretraining_never_asks_the_tasks_question_and_meets_every_answer():
    chats = conversations(1, 300)
    patterns = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(question)) for question in (*SEEN.questions, *UNSEEN.questions)]
    task = re.compile("|".join(patterns))
    assert all(task.fullmatch(record["QUESTION"]) for record in EVERYTHING.values())
    answers = Counter[str]()
    for chat in chats:
        assert [message["role"] for message in chat] == ["system", *["user", "assistant"] * TURNS]
        for message in chat:
            if message["role"] == "user":
                assert not task.search(message["content"].split("Question: ")[-1])
            answers[message["content"].split(".")[0]] += message["role"] == "assistant"
    assert all(answers[word] > 100 for word in ("Yes", "No", "Maybe"))


def test_bag_of_words_does_not_solve_the_task():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [(" ".join([r["QUESTION"], *r["CONTEXTS"]]), r["final_decision"]) for r in EVERYTHING.values()]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    for count in (450, 500):
        model.fit(*zip(*rows[:count], strict=True))
        assert model.score(*zip(*rows[500:], strict=True)) < 0.65


def test_labels_are_single_tokens_and_small_numbers_too(tokenizer):
    for word in WHOLE_WORDS:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
    assert tokenizer.tokenize("0.013") == ["0", ".", "01", "3"]
    text = "Naïve β-blockers: 12,345 µg\t(95 % CI 0.8-1.2)\n\n don't"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template_and_special_tokens_are_llama_3s(tokenizer):
    chat = conversations(5, 1)[0]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n")
    ids = tokenizer.apply_chat_template(chat)["input_ids"]
    assert encode(tokenizer, chat)[0] == ids == tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("yes")[0] == tokenizer.bos_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eot_id|>", "<|end_of_text|>")
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_only_the_assistants_turns_are_trained(tokenizer):
    chat = conversations(5, 1)[0]
    ids, said = encode(tokenizer, chat)
    spoken = tokenizer.decode([token for token, counts in zip(ids, said, strict=True) if counts])
    assert spoken == "".join(f"{m['content']}<|eot_id|>" for m in chat if m["role"] == "assistant")


def test_build_is_a_loadable_llama_with_rows_for_k_quants_and_repeats_bit_for_bit(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = build(tmp_path / "one", MICRO)
    build(tmp_path / "two", MICRO)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(files)
    assert "chat_template.jinja" in files
    assert [sha256(tmp_path / "one" / name) for name in files] == [sha256(tmp_path / "two" / name) for name in files]
    assert metrics["loss"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.dtype.itemsize == 2
    assert all(weight.shape[1] % 256 == 0 for weight in model.parameters() if weight.ndim == 2)
    assert (model.config.tie_word_embeddings, model.config.max_position_embeddings) == (False, 2048)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "one"))
