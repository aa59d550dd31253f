"""The one renderer: chat messages -> text in a model's own chat template, and token ids of training examples.

Templates are rendered with transformers' own environment (special tokens, `raise_exception`, loop controls, the
`{% generation %}` block), with one exception: `strftime_now` gives a fixed date, because today's date would change
every prompt, and so every score, from day to day.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import Fail
from pipeline.core.files import read_text
from pipeline.core.json_files import read_json_object
from pipeline.core.question import Message
from pipeline.models.manifest import TEMPLATE

DATE = date(2024, 7, 26)  # the date that Llama 3.1's template falls back to
LOOKS_SPECIAL = re.compile(r"<[|｜].*[|｜]>")  # noqa: RUF001  # llama.cpp's converter makes such tokens control tokens
PROBE = "Yes. The probe 7 ends here."  # an answer that no template contains


class Chat(NamedTuple):
    """A rendered chat: `prompt`, `answer` and `end` (the end of the turn) together are the whole text."""

    prompt: str
    answer: str
    end: str


class ChatTemplate:
    """A Jinja chat template and the special tokens that it may name.

    The prompt is the rendered text up to the answer. With most templates that is the generation prompt; templates of
    reasoning models put an empty reasoning block between the two, which then belongs to the prompt, so that a label is
    scored at the place where training put it.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], source: str) -> None:
        """Compile `template`; `source` names it in errors. Raises `Fail` if it cannot render a chat."""
        from transformers.utils.chat_template_utils import _compile_jinja_template  # pyright: ignore[reportPrivateUsage]

        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self.compiled: Any = _compile_jinja_template(template)
        except Exception as error:  # jinja's own errors, and others for malformed extensions
            raise Fail(f"{source} is not a valid chat template ({first_line(error)}); choose another base") from None
        self.has_system_role = self.shows_system_message()
        self.check()

    def shows_system_message(self) -> bool:
        """Whether the template takes a system message. Gemma's raises an error; others leave the message out."""
        system: Message = {"role": "system", "content": PROBE}
        try:
            return PROBE in self.text([system, {"role": "user", "content": "a"}], add_generation_prompt=True)
        except Fail:
            return False

    def check(self) -> None:
        """Raise `Fail` unless an answer stands after the generation prompt and is followed by an end of turn."""
        messages: list[Message] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        chat = self.render(messages, PROBE)
        if not chat.prompt.startswith(self.text(self.folded(messages), add_generation_prompt=True)):
            raise Fail(
                f"{self.source}: the prompt with an answer does not begin with the generation prompt, so training and "
                "generation would differ; choose another base"
            )
        if not chat.end.strip():
            raise Fail(
                f"{self.source} puts nothing after an answer, so the model cannot learn to stop; choose another base"
            )

    def folded(self, messages: Sequence[Message]) -> list[Message]:
        """The messages; without a system role, the system message comes before the user's text, as Gemma has it."""
        if self.has_system_role or messages[0]["role"] != "system":
            return list(messages)
        system, user, *rest = messages
        return [{"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}, *rest]

    def text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The rendered messages as they are; raises `Fail`."""
        try:
            return self.compiled.render(
                **self.special_tokens,
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=DATE.strftime,
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            raise Fail(f"{self.source} cannot render a chat ({first_line(error)}); choose another base") from None

    def render(self, messages: Sequence[Message], answer: str) -> Chat:
        """Prompt and answer of a chat whose last turn is the user's; raises `Fail`."""
        folded = self.folded(messages)
        text = self.text([*folded, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        prompt, found, end = text.rpartition(answer.strip())
        if not found:
            raise Fail(f"{self.source} leaves the assistant's answer out or changes it; choose another base")
        return Chat(prompt, found, end)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the assistant's answer begins; raises `Fail`."""
        return self.render(messages, PROBE).prompt


def first_line(error: Exception) -> str:
    """The beginning of a library's message, without what a template may have quoted of the messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of the tokens in a tokenizer_config.json, as transformers gives them to a template."""
    found: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def read_template(base: Path) -> ChatTemplate:
    """The chat template of a base directory; raises `Fail`."""
    config = read_json_object(base / "tokenizer_config.json")
    file = base / TEMPLATE  # older models have it in tokenizer_config.json
    template = config["chat_template"] if not file.is_file() and "chat_template" in config else read_text(file)
    return ChatTemplate(template, special_tokens(config), f"{file}")


def control_tokens(base: Path) -> list[str]:
    """The texts of the base's special tokens, such as `<|eot_id|>`, and of those that llama.cpp takes for special."""
    added: list[Any] = read_json_object(base / "tokenizer.json").get("added_tokens", [])
    return [token["content"] for token in added if token["special"] or LOOKS_SPECIAL.fullmatch(token["content"])]


def as_data(text: str, control: Iterable[str]) -> str:
    """`text` with a space inside each control token's text, so that a tokenizer reads letters and no token.

    Otherwise `<|eot_id|>` in an abstract would end the user's turn.
    """
    names = sorted(control, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), lambda name: f"{name[0][0]} {name[0][1:]}", text) if names else text
