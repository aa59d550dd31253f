"""Other people's bases: small random models with real kinds of tokenizers and templates, from `base` to the GGUF.

A base goes through and is then right, or `base` refuses it in one sentence: no later stage does.
"""

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from pipeline.core.errors import Fail
from pipeline.core.record import Record
from pipeline.models.directory import TINY_BASE
from pipeline.models.probe import check_ids
from pipeline.scoring.protocols import PROTOCOLS, answer, as_question, chat
from pipeline.scoring.scorer import Scorer
from tests.bases import END, add_special, gpt2, llama3, sentencepiece, smollm2, write_model
from tests.conftest import copy_project, output_of, repro, run_command, set_params
from tests.stages.helpers import call, change_json, convert, examples, numbers, tensors

SENTENCE = "choose another base"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with questions; it trains two steps, fast enough that a difference is seen."""
    project = copy_project(tmp_path_factory.mktemp("bases") / "project")
    set_params(project, "download", questions=24, test_questions=20)
    set_params(project, "train", max_steps=2, warmup_steps=0, learning_rate=0.02, lr_scheduler_type="constant")
    set_params(project, "quantize", quant_types=["Q8_0"])
    run(project, "download")
    return project


@pytest.fixture
def started(downloaded: Path, tmp_path: Path) -> Path:
    """A copy of it, whose base is the directory `model` beside it."""
    project = Path(shutil.copytree(downloaded, tmp_path / "project"))
    set_params(project, "base", source="local", path=str(tmp_path / "model"))
    return project


@pytest.fixture(scope="session")
def pieces() -> tuple[Tokenizer, bytes]:
    """What SentencePiece learned, with the families' special tokens, and its tokenizer.model."""
    tokenizer, model = sentencepiece()
    return add_special(tokenizer), model


def run(project: Path, *stages: str) -> None:
    for stage in stages:
        assert call(project, stage) == ""


def probabilities(model: Path, ids: list[int]) -> Any:
    """transformers' probabilities of the token after `ids`."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return torch.softmax(loaded(torch.tensor([ids])).logits[0, -1], -1).numpy()


def check_what_ships(project: Path, model: Path) -> None:
    """Trained ids are llama.cpp's, labels are scored where training put them, and the GGUF stops after a turn."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(project / "models/merged")
    gained = 0.0
    with Scorer(project / "models/medical-reasoner.gguf", 2048, "") as scorer:
        for row in examples(project)[:4]:
            record = Record.model_validate(numbers(project / "data/raw/ori_pqal.json")[row.pmid])
            messages = chat(as_question(row.pmid, record, (project / "data/formatted/system_prompt.txt").read_text()))
            turns = [*messages, {"role": "assistant", "content": answer(record)}]
            whole = tokenizer.apply_chat_template(turns, tokenize=False)  # not by the pipeline's renderer
            assert scorer.tokenize(whole)[: len(row.input_ids)] == row.input_ids
            prompt, learned = row.input_ids[: row.prompt_tokens], row.input_ids[row.prompt_tokens :]
            stops = [scorer.lib.llama_vocab_is_eog(scorer.vocab, token) for token in learned]
            assert stops == [False] * (len(learned) - 1) + [True]
            asked, choices = scorer.encode(messages, PROTOCOLS["chat"])
            capital = choices[row.label][1]
            assert (asked, capital) == (prompt, learned[: len(capital)])
            _, first = scorer.score(asked, choices)
            assert np.abs(np.exp(first) - probabilities(project / "models/merged", prompt)).max() < 0.02
            gained += float(np.exp(first[capital[0]]) - probabilities(model, prompt)[capital[0]])
    assert gained > 0  # what training taught is found where labels are scored


KINDS = {"llama-3": "llama-3", "smollm2": "chatml", "sentencepiece": "zephyr", "gpt-2": "chatml"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_tokenizer_goes_through_every_stage_or_is_refused_by_the_first(
    started: Path, tmp_path: Path, pieces: tuple[Tokenizer, bytes], kind: str
):
    own: dict[str, Callable[[], Tokenizer]] = {
        "llama-3": llama3,
        "smollm2": lambda: smollm2(tmp_path),
        "sentencepiece": lambda: pieces[0],
        "gpt-2": lambda: add_special(gpt2()),
    }
    in_pieces = kind == "sentencepiece"
    model = write_model(tmp_path / "model", own[kind](), KINDS[kind], pieces[1] if in_pieces else b"")
    if in_pieces:  # the template where older models have it: Llama 3's repositories do
        change_json(model / "tokenizer_config.json", chat_template=(model / "chat_template.jinja").read_text())
        (model / "chat_template.jinja").unlink()
    run(started, "base", "format", "train", "merge", "quantize")
    check_what_ships(started, model)
    if in_pieces:  # the untuned base is converted from the directory of its weights
        run(started, "baseline", "evaluate", "reference", "generate")


@pytest.mark.parametrize("wrong", ["llama-bpe", "qwen2", "smollm"])
def test_a_wrong_pre_tokenizer_is_found_in_a_gguf(tmp_path: Path, wrong: str):
    from transformers import PreTrainedTokenizerFast

    model = write_model(tmp_path / "model", add_special(gpt2()), "chatml")
    gguf = convert(model, tmp_path / "vocabulary.gguf", vocab_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    check_ids(model, gguf, tokenizer, every_token=True)
    name, other = (struct.pack("<Q", len(text)) + text.encode() for text in ("gpt-2", wrong))
    whole = gguf.read_bytes()
    assert whole.count(name) == 1
    gguf.write_bytes(whole.replace(name, other))
    with pytest.raises(Fail, match="other token ids than"):
        check_ids(model, gguf, tokenizer, every_token=True)


@pytest.mark.parametrize("family", ["chatml", "llama-3", "zephyr", "gemma", "qwen3", "llama-2"])
def test_a_template_goes_through_or_is_refused_where_its_end_joins_the_answer(
    started: Path, tmp_path: Path, pieces: tuple[Tokenizer, bytes], family: str
):
    tokenizer = pieces[0]
    write_model(tmp_path / "model", tokenizer, family, pieces[1])
    if family == "llama-2":  # its prompt ends in a space, which tokenizers join with the next word
        said = call(started, "base")
        assert ("join" in said, said.endswith(SENTENCE)) == (True, True), said
        return
    run(started, "base", "format")
    row = examples(started)[0]
    prompt, learned = row.input_ids[: row.prompt_tokens], row.input_ids[row.prompt_tokens :]
    assert tokenizer.id_to_token(learned[-1]) == END.get(family, "</s>")
    assert tokenizer.decode(learned).split(".")[0].lower().strip() == row.label
    assert ("</think>" in tokenizer.decode(prompt, skip_special_tokens=False)) == (family == "qwen3")


def without_pieces(model: Path) -> None:
    (model / "tokenizer.model").unlink()


def two_templates(model: Path) -> None:
    """llama.cpp takes the one in tokenizer_config.json, transformers the file."""
    template = (model / "chat_template.jinja").read_text()
    change_json(model / "tokenizer_config.json", chat_template=template.replace("<|", "<||"))


def other_end(model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("eos_token", "'<bos>'"))


def unknown_to_llama_cpp(model: Path) -> None:
    change_json(model / "config.json", architectures=["NoSuchForCausalLM"])


def punctuation_apart(model: Path) -> None:
    """GPT-2's regular expression after a step that no known structure has, and a vocabulary that no hash knows."""
    tokenizer = gpt2(500)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), tokenizer.pre_tokenizer])
    add_special(tokenizer).save(str(model / "tokenizer.json"))
    without_pieces(model)


def llama3s_split(model: Path) -> None:
    """Llama 3's regular expression, but words of the vocabulary are not always one token."""
    tokenizer = gpt2(500)
    tokenizer.pre_tokenizer = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json")).pre_tokenizer
    add_special(tokenizer).save(str(model / "tokenizer.json"))
    without_pieces(model)


LATE: dict[Callable[[Path], None], str] = {
    without_pieces: "llama.cpp gives a probe text other token ids",
    two_templates: "llama.cpp gets another chat template",
    other_end: "llama.cpp does not stop generation there: set eos_token",
    unknown_to_llama_cpp: "the architecture is not supported",
    punctuation_apart: "BPE pre-tokenizer was not recognized",
    llama3s_split: "BPE pre-tokenizer was not recognized",
}


@pytest.mark.parametrize("change", LATE, ids=lambda change: change.__name__)
def test_what_the_converter_or_the_gguf_would_get_wrong_is_refused_before_training(
    started: Path, tmp_path: Path, pieces: tuple[Tokenizer, bytes], change: Callable[[Path], None]
):
    model = write_model(tmp_path / "model", pieces[0], "zephyr", pieces[1])
    change(model)
    said = call(started, "base")
    assert (LATE[change] in said, said.endswith(SENTENCE)) == (True, True), said
    assert not list((started / "models").glob("*"))
    if change is other_end:  # the remedy
        change_json(model / "tokenizer_config.json", eos_token="<bos>")
        run(started, "base", "format")


def test_changed_weights_are_taken_by_the_command_that_the_refusal_names(
    started: Path, tmp_path: Path, pieces: tuple[Tokenizer, bytes]
):
    from safetensors.torch import save_file

    weights = write_model(tmp_path / "model", pieces[0], "zephyr", pieces[1]) / "model.safetensors"
    output_of(started, "git init -q")
    assert repro(started, "-s base") == ["base"]
    save_file({name: 2 * value for name, value in tensors(weights).items()}, weights, {"format": "pt"})
    assert repro(started, "-s base") == []  # DVC does not look at the directory
    find = "python3 -m pipeline.models.weights models/base"
    refusal = run_command(started, find).stdout
    assert "does not have the sha256" in refusal
    output_of(started, f"python3 -m {re.findall('`([^`]*)`', refusal)[0]}")
    assert output_of(started, find).strip() == str(weights.parent)


def test_outputs_of_format_do_not_depend_on_the_limits_that_it_checks(started: Path):
    set_params(started, "base", source="tiny", path=None)
    run(started, "base", "format")
    outputs = [path for path in (started / "data/formatted").iterdir() if path.is_file()]
    before = [path.read_bytes() for path in outputs]
    longest = max(len(row.input_ids) for split in ("train", "validation") for row in examples(started, split))
    set_params(started, "train", max_length=longest)
    set_params(started, "evaluate", n_ctx=1500)
    run(started, "format")
    assert [path.read_bytes() for path in outputs] == before
    set_params(started, "train", max_length=longest - 1)
    set_params(started, "evaluate", n_ctx=64)
    change_json(started / "models/base/config.json", max_position_embeddings=100)
    said = call(started, "format")
    words = [f"train.max_length is {longest - 1} tokens", f"to {longest},", "n_ctx is 64", "the base's context is 100"]
    assert [word for word in words if word not in said] == []
