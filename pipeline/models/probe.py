"""Whether llama.cpp sees the token ids that training saw: a probe text through every tokenizer of a model."""

from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail
from pipeline.core.question import Message
from pipeline.models.chat import control_tokens, read_template
from pipeline.models.encoder import Encoder
from pipeline.models.vocabulary import Vocabulary

# Kinds of text on which pre-tokenizers differ.
PROBE = (
    "P = 0.0317 (95% CI 1.24\u20132.75), n=1234567; it's the patient's 3rd visit, don't they'll.\n\n\n"
    "Übergröße naïve Ménière œdème\u00a0\u202f\u2009 \ttab  double   triple spaces \n \n"
    "漢字とカタカナ 한국어 العربية ελληνικά Привет 👩🏽\u200d⚕️🧬 ½ ² ﬁ ™ e\u0301 "
    "snake_case camelCase ALLCAPS "
    'http://example.org/a?b=1&c=2 <b>x</b> {"k": [1, 2]} \\n --- ... yes Yes no No maybe Maybe'
)


MESSAGES: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBE}]


def token_texts(tokenizer: Any) -> list[str]:
    """The text of every token of a `tokenizers.Tokenizer` that is whole characters, without added tokens.

    Two pre-tokenizers that split such texts alike differ at most where the vocabulary has no token.
    """
    added = tokenizer.get_added_tokens_decoder()
    texts = [tokenizer.decode([token]) for token in sorted(tokenizer.get_vocab().values()) if token not in added]
    return [text for text in texts if text and "\ufffd" not in text]


def check_ids(model: Path, gguf: Path, tokenizer: Any, every_token: bool) -> None:
    """Raise `Fail` unless llama.cpp, transformers' `tokenizer` and the encoder of training examples agree.

    They must give the same ids, and generation must stop at the token that training puts after an answer. With
    `every_token`, llama.cpp and the encoder must also agree on the text of each token of the vocabulary.
    """
    encoder = Encoder(model)
    chat = read_template(model).render(MESSAGES, "Yes. It is.")
    texts = [PROBE, "".join(chat), " a ".join(control_tokens(model)[:50])]
    with Vocabulary(gguf, "choose another base", vocab_only=True) as vocabulary:
        for text in texts:
            trained = encoder.ids(text)
            others = {
                "llama.cpp": vocabulary.tokenize(text),
                "transformers": tokenizer.encode(text, add_special_tokens=False),
            }
            for name, found in others.items():
                if found != trained:
                    place = next(
                        (i for i, pair in enumerate(zip(found, trained, strict=False)) if pair[0] != pair[1]), 0
                    )
                    raise Fail(
                        f"{name} gives a probe text other token ids than tokenizer.json (from token {place} on), so "
                        "the shipped model would read other text than it was trained on; choose another base"
                    )
        for text in token_texts(encoder.tokenizer) if every_token else []:
            if vocabulary.tokenize(text) != encoder.ids(text):
                raise Fail(
                    f"llama.cpp gives the text of token {encoder.ids(text)} other token ids than tokenizer.json, so it "
                    f"splits text differently; choose another base"
                )
        if vocabulary.template.render(MESSAGES, "Yes. It is.") != chat:
            raise Fail(
                "llama.cpp gets another chat template or other special tokens than training: make "
                "tokenizer_config.json, chat_template.jinja and config.json agree, or choose another base"
            )
        end = encoder.example(chat)[0][-1]
        if not vocabulary.ends(end):
            raise Fail(
                f"the chat template ends a turn with token {end}, and llama.cpp does not stop generation there: set "
                "eos_token in the base's tokenizer_config.json to it, or choose another base"
            )
