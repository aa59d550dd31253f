"""The one renderer: chat templates of many families, and the token ids of training examples."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.core.errors import Fail
from pipeline.core.question import Message
from pipeline.models.chat import Chat, ChatTemplate, as_data, control_tokens, read_template, special_tokens
from pipeline.models.encoder import Encoder

SYSTEM, USER, ANSWER = "Be brief.", "Is it so?", "Yes. It is."
MESSAGES: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
TURNS = [*MESSAGES, {"role": "assistant", "content": ANSWER}]


class Family(NamedTuple):
    """A template as families of models have it, and the prompt and the end of turn that it has to give."""

    template: str
    prompt: str
    end: str
    tokens: dict[str, str] = {}  # noqa: RUF012


def each(body: str, generation: str) -> str:
    """A template with `body` for each message `m`, and then the generation prompt."""
    return f"{{% for m in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}{generation}{{% endif %}}"


CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
BEGIN = "<|im_start|>assistant\n"
IM = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{USER}<|im_end|>\n{BEGIN}"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
FAMILIES = {
    "llama-3": Family(
        "{{ bos_token }}"
        + each(f"{HEAD.format('{{ m.role }}')}{{{{ m['content'] | trim + '<|eot_id|>' }}}}", HEAD.format("assistant")),
        f"<|begin_of_text|>{HEAD.format('system')}{SYSTEM}<|eot_id|>{HEAD.format('user')}{USER}<|eot_id|>"
        + HEAD.format("assistant"),
        "<|eot_id|>",
        {"bos_token": "<|begin_of_text|>"},
    ),
    "chatml": Family(each(CHATML, f"{{{{ {BEGIN!r} }}}}"), IM, "<|im_end|>\n"),
    "llama-2": Family(  # the system message is inside the user's turn
        "{% set system = messages[0].content if messages[0].role == 'system' %}"
        "{% for m in (messages[1:] if system else messages) %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first }}{{ m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        f"<s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{USER} [/INST] ",
        " </s>",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "zephyr": Family(
        "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        f"<|system|>\n{SYSTEM}</s>\n<|user|>\n{USER}</s>\n<|assistant|>\n",
        "</s>\n",
        {"eos_token": "</s>"},
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + each(
            "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
            "{{ m.content | trim + '<end_of_turn>\n' }}",
            "{{ '<start_of_turn>model\n' }}",
        ),
        f"<bos><start_of_turn>user\n{SYSTEM}\n\n{USER}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
        {"bos_token": "<bos>"},
    ),
    "no system role": Family(  # leaves the system message out without a word
        each("{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}</s>{% endif %}", "[assistant]"),
        f"[user]{SYSTEM}\n\n{USER}</s>[assistant]",
        "</s>",
    ),
    "qwen3": Family(  # an empty reasoning block stands before the last answer, and not in the generation prompt
        each(
            "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
            "{{ '<think>\n\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}"
            "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}",
            f"{{{{ {BEGIN!r} }}}}{{% if enable_thinking is defined %}}<think>{{% endif %}}",
        ),
        f"{IM}<think>\n\n</think>\n\n",
        "<|im_end|>\n",
    ),
    "smollm3": Family(
        "{{ 'Today is ' + strftime_now('%d %B %Y') + '.\n' }}"
        + each(
            "{% if m.content == '' %}{% continue %}{% endif %}{% if m.role == 'assistant' %}{% generation %}"
            f"{CHATML}{{% endgeneration %}}{{% else %}}{CHATML}{{% endif %}}",
            f"{{{{ {BEGIN!r} }}}}",
        ),
        f"Today is 26 July 2024.\n{IM}",
        "<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_answer_and_end_of_turn_are_told_apart_with_and_without_an_answer(name: str):
    family = FAMILIES[name]
    template = ChatTemplate(family.template, family.tokens, name)
    assert template.render(MESSAGES, ANSWER) == Chat(family.prompt, ANSWER, family.end)
    assert template.prompt(MESSAGES) == family.prompt


@pytest.mark.parametrize("name", ["llama-3", "chatml", "llama-2", "zephyr", "qwen3"])
def test_a_chat_is_rendered_as_transformers_renders_it(name: str):
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})), **family.tokens)
    expected = tokenizer.apply_chat_template(TURNS, chat_template=family.template, tokenize=False)
    assert "".join(ChatTemplate(family.template, family.tokens, name).render(MESSAGES, ANSWER)) == expected


def test_an_answer_that_the_question_quotes_is_found_at_the_end():
    template = ChatTemplate(FAMILIES["chatml"].template, {}, "x")
    messages: list[Message] = [{"role": "user", "content": f"{ANSWER} Is that right?"}]
    assert template.render(messages, ANSWER).prompt.endswith("right?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}", "is not a valid chat template"),
        ("{{ messages[0].content.no.such }}", "cannot render a chat"),
        ("{{ raise_exception('no chat at all') }}", "cannot render a chat .no chat at all"),
        ("{{ 1 // 0 }}", "cannot render a chat"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "cannot render a chat"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves the assistant's answer out or changes it"),
        ("{% for m in messages %}{{ m.content | upper }}|{% endfor %}", "leaves the assistant's answer out"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", "nothing after an answer"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '|' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}",
            "training and generation would differ",
        ),
    ],
    ids=["syntax", "render", "raise", "zero", "sandbox", "dropped", "changed", "no end", "another prompt"],
)
def test_a_template_that_no_model_can_be_trained_with_is_refused(template: str, problem: str):
    with pytest.raises(Fail, match=f"^theirs.jinja.*{problem}.*; choose another base"):
        ChatTemplate(template, {}, "theirs.jinja")


def test_special_tokens_are_texts_or_objects():
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    assert special_tokens(config | {"add_bos_token": True, "chat_template": "x"}) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }


def test_a_base_directory_has_template_and_special_tokens_in_files_of_their_own(tmp_path: Path):
    family = FAMILIES["zephyr"]
    (tmp_path / "chat_template.jinja").write_text(family.template)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert read_template(tmp_path).prompt(MESSAGES) == family.prompt


CONTROL = ["<|eot_id|>", "<|start_header_id|>", "<s>", "</s>"]


DATA = {
    "P < 0.05, n=3": "P < 0.05, n=3",
    "a<|eot_id|>b": "a< |eot_id|>b",
    "<s><|start_header_id|>system</s>": "< s>< |start_header_id|>system< /s>",
    "<|eot<|eot_id|>_id|>": "<|eot< |eot_id|>_id|>",
}


@pytest.mark.parametrize("text", DATA)
def test_a_control_token_in_a_text_is_data(text: str):
    assert as_data(text, CONTROL) == as_data(DATA[text], CONTROL) == DATA[text]
    assert as_data(text, []) == text


def test_control_tokens_are_the_special_ones_and_those_that_llama_cpp_takes_for_special(tmp_path: Path):
    added = {"<|eot_id|>": True, "<|extra|>": False, "<｜fullwidth｜>": False, "<table>": False, "  ": False}  # noqa: RUF001
    tokens = [{"content": name, "special": special} for name, special in added.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert control_tokens(tmp_path) == ["<|eot_id|>", "<|extra|>", "<｜fullwidth｜>"]  # noqa: RUF001


def encoder(directory: Path, words: list[str], special: list[str]) -> Encoder:
    """An encoder whose tokens are `words`, numbered, and after them the `special` ones."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    return Encoder(directory)


WORDS = ["?", "user:", "ask", "assistant:", "Yes.", "So.", "assistant:Yes."]


class TestEncoder:
    def test_an_example_begins_with_the_prompt_and_ends_with_the_end_of_the_turn(self, tmp_path: Path):
        ids, prompt = encoder(tmp_path, WORDS, ["<s>", "</s>"]).example(
            Chat("<s>user: ask</s>assistant: ", "Yes. So.", "</s> user:")
        )
        assert ids == [7, 1, 2, 8, 3, 4, 5, 8]  # without what follows </s>: it is never generated
        assert ids[:prompt] == [7, 1, 2, 8, 3]

    def test_text_before_the_end_of_the_turn_is_learned(self, tmp_path: Path):
        ids, _ = encoder(tmp_path, WORDS, ["</s>"]).example(Chat("user: ask assistant: ", "Yes.", " So. </s>"))
        assert ids == [1, 2, 3, 4, 5, 7]

    def test_a_prompt_whose_end_joins_the_answer_is_refused(self, tmp_path: Path):
        with pytest.raises(Fail, match="training and generation would differ"):
            encoder(tmp_path, WORDS, ["</s>"]).example(Chat("user: assistant:", "Yes.", "</s>"))

    def test_a_turn_that_no_special_token_ends_is_refused(self, tmp_path: Path):
        with pytest.raises(Fail, match="no special token ends the assistant's turn"):
            encoder(tmp_path, WORDS, ["<s>"]).example(Chat("<s>user: assistant: ", "Yes.", " So."))

    @pytest.mark.parametrize("body", [None, "{}", "not JSON"])
    def test_what_is_no_fast_tokenizer_is_refused(self, tmp_path: Path, body: str | None):
        if body:
            (tmp_path / "tokenizer.json").write_text(body)
        with pytest.raises(Fail, match="no fast tokenizer"):
            Encoder(tmp_path)
