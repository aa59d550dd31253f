"""Rendered chats -> token ids of training examples."""

from pathlib import Path
from typing import Any

from pipeline.core.errors import Fail
from pipeline.models.chat import Chat


class Encoder:
    """A base's tokenizer, for training examples."""

    def __init__(self, base: Path) -> None:
        """Load `base`/tokenizer.json; raises `Fail`."""
        from tokenizers import Tokenizer

        try:
            self.tokenizer: Any = Tokenizer.from_file(str(base / "tokenizer.json"))
        except Exception:  # the library raises a bare Exception
            raise Fail(
                f"{base}/tokenizer.json is missing or no fast tokenizer; choose another base, or run `dvc repro -f -s "
                "base`"
            ) from None
        self.base = base
        self.special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens in it parsed, none added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def example(self, chat: Chat) -> tuple[list[int], int]:
        """Ids of prompt, answer and the token that ends the turn, and the number of ids that are the prompt.

        Raises `Fail` if the prompt's ids are not the beginning of the whole text's: generation starts from them.
        """
        prompt, whole = self.ids(chat.prompt), self.ids(chat.prompt + chat.answer + chat.end)
        if whole[: len(prompt)] != prompt:
            raise Fail(
                f"{self.base}/tokenizer.json joins the end of the prompt and the beginning of the answer into one "
                "token, so training and generation would differ; choose another base"
            )
        # What follows the end of the turn, such as ChatML's newline, is never generated.
        answer = len(self.ids(chat.prompt + chat.answer))
        end = next((i for i in range(max(answer - 1, len(prompt)), len(whole)) if whole[i] in self.special), None)
        if end is None:
            raise Fail(f"{self.base}: no special token ends the assistant's turn; choose another base")
        return whole[: end + 1], len(prompt)
