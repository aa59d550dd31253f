"""Train the tiny base's tokenizer: byte-level BPE that splits text as Llama 3 does, with Llama 3's chat template.

llama.cpp's `llama-bpe` pre-tokenizer then gives the ids that `transformers` gives.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, END_OF_TEXT, START_HEADER, END_HEADER, EOT = SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
# The pre-tokenizer's pattern in the tokenizer.json of meta-llama/Meta-Llama-3-8B-Instruct.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The chat template of the same model, character for character.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
# Llama 3 has each of these as one token, with and without a leading space: one token then scores one label.
WHOLE_WORDS = ("yes", "no", "maybe", "Yes", "No", "Maybe", "system", "user", "assistant")
CONTEXT = 2048  # tokens: a real PubMedQA prompt takes about 1,500 of this tokenizer's


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer of at most `vocab_size` tokens (fewer if `texts` offer fewer merges), special tokens last."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    # ignore_merges as in Llama 3, and as llama.cpp assumes for `llama-bpe`.
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Llama 3 has every number of one to three digits as one token; here one or two, so that a P value is one token.
    numbers = " ".join(f"{n:02d}" for n in range(100))
    small = " ".join(f"{n:02d}" for n in range(10))  # first, so that 0.013 reads 0 . 01 3
    digits = str.maketrans(dict.fromkeys("0123456789", " "))  # no other numbers become tokens
    words = [" ".join(WHOLE_WORDS), numbers, small, *(f"{word}\n {word}" for word in WHOLE_WORDS)] * 10_000
    bpe.train_from_iterator([*words, *(text.translate(digits) for text in texts)], trainer)
    bpe.add_special_tokens(list(SPECIALS))
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOT, pad_token=END_OF_TEXT, model_max_length=CONTEXT
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
