"""A GGUF in llama.cpp: how it splits text into tokens, and its chat template."""

import ctypes
from pathlib import Path
from typing import Any, Self

from pipeline.core.errors import Fail
from pipeline.models.chat import ChatTemplate
from pipeline.models.gguf_header import read_header


class Vocabulary:
    """A loaded GGUF's vocabulary. Use it as a context manager: it holds native memory."""

    def __init__(self, gguf: Path, remedy: str, **options: Any) -> None:
        """Load `gguf` with llama.cpp's parameters of a model; `remedy` is what to do if it cannot. Raises `Fail`."""
        import llama_cpp
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        self.lib: Any = llama_cpp
        self.model: Any = None
        read_header(gguf)  # refuses a damaged file before native code reads it
        params = llama_cpp.llama_model_default_params()
        for name, value in options.items():
            setattr(params, name, value)
        self.model = llama_cpp.llama_model_load_from_file(bytes(gguf), params)
        if not self.model:
            raise Fail(f"{gguf} cannot be loaded by llama.cpp: it is damaged, or memory is short; {remedy}")
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.template = self.chat_template(gguf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.model:
            self.lib.llama_model_free(self.model)

    def chat_template(self, gguf: Path) -> ChatTemplate:
        """The GGUF's own chat template, which other programs use too; raises `Fail`."""
        template = self.lib.llama_model_chat_template(self.model, None)
        if not template:
            raise Fail(f"{gguf} has no chat template; run `dvc repro` on an instruct model")
        tokens = {name: getattr(self.lib, f"llama_vocab_{name}")(self.vocab) for name in ("bos", "eos", "pad")}
        texts = {
            f"{name}_token": self.piece(token).decode(errors="replace") for name, token in tokens.items() if token >= 0
        }
        return ChatTemplate(template.decode(), texts, f"the chat template of {gguf}")

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of `text`, special tokens parsed; with `add_special`, BOS where the vocabulary asks for it."""
        data = text.encode()
        tokens = (self.lib.llama_token * (len(data) + 2))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), add_special, True)
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of a token; a special token's name."""
        buffer = ctypes.create_string_buffer(256)
        length = self.lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:length]

    def ends(self, token: int) -> bool:
        """Whether generation stops at the token."""
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, such as the end of a turn."""
        return bool(self.lib.llama_vocab_is_control(self.vocab, token))

    def control_tokens(self) -> list[str]:
        """The texts of the control tokens, such as `<|eot_id|>`."""
        return [self.piece(token).decode(errors="replace") for token in range(self.n_vocab) if self.is_control(token)]
