"""Build the tiny base on the spot: a Llama that plays the part of a small *instruct* model, not trained for the task.

It is pretrained on simulated chats about simulated abstracts (`trials.conversations`): it copies facts, compares
numbers, reads P values and has met yes, no and maybe as answers, to other questions than the task's.
Rows of a multiple of 256 are what llama.cpp's K-quants need; other widths silently fall back to other types.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.embedded.tokenizer import BOS, CONTEXT, END_HEADER, END_OF_TEXT, EOT, START_HEADER, train_tokenizer
from pipeline.embedded.trials import conversations
from pipeline.records import Message
from pipeline.stage import Section

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Positive = Annotated[int, Field(gt=0)]
Row = Annotated[int, Field(gt=0, multiple_of=256)]
HELD_OUT = 100  # chats that pretraining never sees
WARMUP = 0.1  # share of the steps


class Tiny(Section):
    """The tiny base's parameters; names as in transformers' LlamaConfig and TrainingArguments."""

    source: Literal["tiny"]
    seed: Annotated[int, Field(ge=0)]
    vocab_size: Annotated[int, Field(ge=512)]
    hidden_size: Row
    intermediate_size: Row
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    conversations: Positive
    max_steps: Positive
    per_device_train_batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)]


def encode(tokenizer: "PreTrainedTokenizerFast", chat: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat as the chat template gives them, and which of them the assistant says (its end included)."""
    bos, eot = tokenizer.convert_tokens_to_ids([BOS, EOT])
    ids, said = [bos], [False]
    for message in chat:
        header = f"{START_HEADER}{message['role']}{END_HEADER}\n\n"
        for text, counts in ((header, False), (message["content"], message["role"] == "assistant")):
            part = tokenizer.encode(text, add_special_tokens=False)
            ids += part
            said += [counts] * len(part)
        ids.append(eot)
        said.append(message["role"] == "assistant")
    return ids, said


def batch_of(rows: list[tuple[list[int], list[bool]]], pad: int) -> "tuple[Tensor, Tensor]":
    """Rows as ids and labels of shape (rows, longest); labels are -100 but on the assistant's tokens."""
    import torch

    ids = torch.full((len(rows), max(len(row) for row, _ in rows)), pad)
    labels = torch.full_like(ids, -100)
    for i, (row, said) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.where(torch.tensor(said), ids[i, : len(row)], -100)
    return ids, labels


def autocast() -> Any:
    """bfloat16 arithmetic where the processor has it (1.6 times as fast), else float32."""
    import torch

    features = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(features.get("avx512_bf16") or features.get("amx_bf16")))


def pretrain(model: "LlamaForCausalLM", rows: list[tuple[list[int], list[bool]]], pad: int, params: Tiny) -> float:
    """Train on the assistant's turns with AdamW and a linear schedule; the mean loss of the last tenth of the steps."""
    import torch
    from tqdm import tqdm
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * params.max_steps), params.max_steps)
    order = torch.Generator().manual_seed(params.seed)
    queue: list[int] = []
    losses: list[float] = []
    model.train()
    for _ in tqdm(range(params.max_steps), desc="pretraining the tiny base", unit="step"):
        if len(queue) < params.per_device_train_batch_size:
            queue += torch.randperm(len(rows), generator=order).tolist()
        picked, queue = queue[: params.per_device_train_batch_size], queue[params.per_device_train_batch_size :]
        ids, labels = batch_of([rows[i] for i in picked], pad)
        with autocast():
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def accuracy(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", chats: list[list[Message]]
) -> dict[str, float]:
    """Share of right answers over all questions of `chats`, and over those answered yes, no and maybe.

    An answer is right if every token of it is the likeliest one, that is, if greedy decoding writes it.
    """
    import torch

    model.eval()
    right: dict[str, list[bool]] = {"": [], "yes": [], "no": [], "maybe": []}
    for chat in chats:
        ids, said = encode(tokenizer, chat)
        with torch.inference_mode(), autocast():
            best = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        hits = [best[i - 1] == ids[i] for i in range(1, len(ids)) if said[i]]
        for message in chat:
            if message["role"] != "assistant":
                continue
            length = len(tokenizer.encode(message["content"], add_special_tokens=False)) + 1
            hit, hits = all(hits[:length]), hits[length:]
            right[""].append(hit)
            word = message["content"].split(".")[0].lower()
            if word in right:
                right[word].append(hit)
    return {f"heldout_{word}_accuracy".replace("__", "_"): sum(h) / len(h) for word, h in right.items() if h}


def build(directory: Path, params: Tiny) -> dict[str, float]:
    """Train tokenizer and model, save both in `directory` as `from_pretrained` expects them; the metrics of pretraining."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed

    chats = conversations(params.seed, params.conversations + HELD_OUT)
    train, held_out = chats[:-HELD_OUT], chats[-HELD_OUT:]
    tokenizer = train_tokenizer([m["content"] for chat in train for m in chat], params.vocab_size)
    bos, pad, eot = tokenizer.convert_tokens_to_ids([BOS, END_OF_TEXT, EOT])
    set_seed(params.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=params.hidden_size,
        intermediate_size=params.intermediate_size,
        num_hidden_layers=params.num_hidden_layers,
        num_attention_heads=params.num_attention_heads,
        num_key_value_heads=params.num_key_value_heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eot,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    loss = pretrain(model, [encode(tokenizer, chat) for chat in train], pad, params)
    model.to(torch.bfloat16)
    metrics = {"loss": loss, **accuracy(model, tokenizer, held_out)}
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[eot, pad], pad_token_id=pad, do_sample=False
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return metrics
