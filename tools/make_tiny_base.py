"""Make the tiny base: `python -m tools.make_tiny_base DIRECTORY` trains its tokenizer and its weights from a seed.

The tiny base is a Llama of 3 million parameters that plays the part of a small *instruct* model. It is pretrained on
simulated chats (`tools.tiny_conversations`) and not trained for the task. Rows of a multiple of 256 are what
llama.cpp's K-quants need; other widths silently fall back to other types.

A CUDA card takes minutes, a CPU many hours. The result depends on the processor in its last bits, so the weights are
kept in git and not made again.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tools.tiny_conversations import PretrainingMessage, Style, conversation
from tools.tiny_tokenizer import BOS, CONTEXT, END_HEADER, END_OF_TEXT, EOT, START_HEADER, train_tokenizer

HELD_OUT_SEED = 1_000_000  # chats that pretraining never sees
Row = tuple[list[int], list[bool]]  # token ids of a chat, and which of them are to be learnt


@dataclass(frozen=True)
class Stage:
    """A stage of pretraining, with AdamW."""

    style: Style  # of its chats
    chats_seed: int
    max_steps: int
    batch_size: int  # chats in a step
    learning_rate: float
    warmup_steps: int  # in which the learning rate rises
    decay: float = 0.5  # share of the steps, the last ones, in which it falls
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Settings:
    """Names as in transformers' LlamaConfig and TrainingArguments."""

    seed: int = 2  # of the weights
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    tokenizer_chats: int = 20_000  # of the first stage, that the tokenizer is trained on
    stages: tuple[Stage, ...] = (
        Stage(Style(6, 5, 0.1, 0.2), 1, 1856, 64, 3e-3, 100),
        # Without this, names are copied from their usual place in the abstract, and from wrong places in other wording.
        Stage(Style(2, 6, 0.3, 0.25, 0.1, 0.5, 0.4), 2, 1500, 64, 1e-3, 20),
    )


def encode(tokenizer: PreTrainedTokenizerFast, chat: list[PretrainingMessage]) -> Row:
    """Token ids of a chat as the chat template gives them, and which are to be learnt.

    These are the assistant's with the end of its turn, but for what is `given`.
    """
    texts: list[str] = []
    for message in chat:
        texts += [f"{START_HEADER}{message['role']}{END_HEADER}\n\n", message["content"], message.get("given", "")]
    # The library's own tokenizer: transformers' `encode` takes three times as long on short texts.
    parts = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    bos, eot = cast("list[int]", tokenizer.convert_tokens_to_ids([BOS, EOT]))
    ids, learnt = [bos], [False]
    for message, header, content, given in zip(chat, parts, parts, parts, strict=True):
        ids += [*header.ids, *content.ids, eot]
        learnt += [False] * (len(header) + len(given))
        learnt += [message["role"] == "assistant"] * (len(content) - len(given) + 1)
    return ids, learnt


def batch_of(rows: list[Row], pad: int) -> tuple[Tensor, Tensor]:
    """Rows as ids and labels of shape (rows, longest); labels are -100 but on the tokens to be learnt."""
    ids = torch.full((len(rows), max(len(row) for row, _ in rows)), pad)
    labels = torch.full_like(ids, -100)
    for i, (row, learnt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.where(torch.tensor(learnt), ids[i, : len(row)], -100)
    return ids, labels


class Chats(Dataset[Row]):
    """A stage's encoded chats by number: each is drawn when it is asked for, so none is ever seen twice."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> None:
        self.tokenizer, self.stage = tokenizer, stage

    def __len__(self) -> int:
        return self.stage.max_steps * self.stage.batch_size

    def __getitem__(self, index: int) -> Row:
        return encode(self.tokenizer, conversation(self.stage.chats_seed, index, self.stage.style))


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy (nats a token) of the labels; only their positions get logits.

    Both come from the CPU, so that the card is never waited for: how many labels there are is known here.
    """
    device = next(model.parameters()).device
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    targets = labels[rows, columns + 1].to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.model(input_ids=ids.to(device, non_blocking=True)).last_hidden_state
        logits = model.lm_head(hidden[rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)])
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def rate(step: int, stage: Stage) -> float:
    """Share of the learning rate in a step: it rises, stays and falls, in straight lines."""
    falling = stage.decay * stage.max_steps
    return min(1.0, (step + 1) / stage.warmup_steps, (stage.max_steps - step) / falling)


def pretrain(model: LlamaForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], stage: Stage) -> None:
    """Train on the assistant's turns with AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        stage.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=stage.weight_decay,
        fused=torch.cuda.is_available(),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, stage=stage))
    model.train()
    for step, (ids, labels) in enumerate(bar := tqdm(batches, total=stage.max_steps, mininterval=10)):
        loss = loss_of(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def answered(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, style: Style, chats: int) -> float:
    """Share of right answers to the questions of held-out chats: right if greedy decoding writes every token of it.

    Answers with a given decision do not count: more than one sentence is right.
    """
    device = next(model.parameters()).device
    model.eval()
    right: list[bool] = []
    for index in range(chats):
        chat = conversation(HELD_OUT_SEED, index, style)
        ids, learnt = encode(tokenizer, chat)
        with torch.inference_mode():
            best = model(input_ids=torch.tensor([ids], device=device)).logits[0].argmax(-1).tolist()
        starts = [i for i in range(1, len(ids)) if learnt[i] and not learnt[i - 1]]
        answers = [message for message in chat if message["role"] == "assistant"]
        for start, answer in zip(starts, answers, strict=True):
            end = learnt.index(False, start) if False in learnt[start:] else len(ids)
            if not answer.get("given"):
                right.append(best[start - 1 : end - 1] == ids[start:end])
    return sum(right) / len(right)


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """A Llama with random weights."""
    bos, pad, eot = cast("list[int]", tokenizer.convert_tokens_to_ids([BOS, END_OF_TEXT, EOT]))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},  # Llama 3's
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=bos,
        eos_token_id=eot,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[eot, pad], pad_token_id=pad, do_sample=False
    )
    return model


def new_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the first stage's chats."""
    stage = settings.stages[0]
    chats = (conversation(stage.chats_seed, index, stage.style) for index in range(settings.tokenizer_chats))
    return train_tokenizer((m["content"] for chat in chats for m in chat), settings.vocab_size)


def make(directory: Path, settings: Settings, workers: int) -> None:
    """Train tokenizer and model and save both in `directory`."""
    tokenizer = new_tokenizer(settings)
    pad = cast(int, tokenizer.convert_tokens_to_ids(END_OF_TEXT))
    set_seed(settings.seed)
    model = new_model(tokenizer, settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    for stage in settings.stages:
        batches: Any = DataLoader(
            Chats(tokenizer, stage),
            stage.batch_size,
            num_workers=workers,
            collate_fn=partial(batch_of, pad=pad),
            pin_memory=torch.cuda.is_available(),
        )
        pretrain(model.float(), batches, stage)
        model.bfloat16()
        print(f"{answered(model, tokenizer, stage.style, 100):.1%} of the questions of held-out chats answered right")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workers", type=int, default=4, help="processes that draw chats")
    arguments = parser.parse_args()
    make(arguments.directory, Settings(), arguments.workers)


if __name__ == "__main__":
    main()
