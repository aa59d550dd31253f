"""Build the tiny base on the spot: a Llama that plays the part of a small *instruct* model, not trained for the task.

It is pretrained on simulated chats about simulated abstracts (`trials.conversations`): it copies facts, compares
numbers, reads P values and has met yes, no and maybe as answers, to other questions than the task's.
Rows of a multiple of 256 are what llama.cpp's K-quants need; other widths silently fall back to other types.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field

from pipeline.core.records import Message
from pipeline.core.stage import Section
from pipeline.simulated.tokenizer import BOS, CONTEXT, END_HEADER, END_OF_TEXT, EOT, START_HEADER, train_tokenizer
from pipeline.simulated.trials import conversations

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Positive = Annotated[int, Field(gt=0)]
Row = Annotated[int, Field(gt=0, multiple_of=256)]
HELD_OUT = 100  # chats that pretraining never sees
WARMUP, DECAY = 0.05, 0.5  # shares of the steps in which the learning rate rises and falls, in a straight line
EMBEDDING_LEARNING_RATE = 3e-3  # of AdamW: embedding, output head and norms


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
    learning_rate: Annotated[float, Field(gt=0)]  # of the layers' matrices


def encode(tokenizer: "PreTrainedTokenizerFast", chat: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat as the chat template gives them, and which of them the assistant says (its end included)."""
    bos, eot = cast("list[int]", tokenizer.convert_tokens_to_ids([BOS, EOT]))
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


def initialise(model: "LlamaForCausalLM") -> None:
    """Start from weights that copy: a head's output undoes its value, and the output rows are the embedding's.

    Copying a name or a number from the abstract is then there from the first step ('mimetic initialisation', Trockman
    and Kolter 2023, https://arxiv.org/abs/2305.09828); from random weights the same steps reach half the accuracy.
    """
    import torch

    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        for layer in model.model.layers:
            attention: Any = layer.self_attn
            groups = attention.num_key_value_groups
            heads = attention.v_proj.weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, 0)
            attention.o_proj.weight.copy_(heads.flatten(0, 1).T)


def orthogonal(updates: "Tensor") -> "Tensor":
    """The nearest semi-orthogonal matrices to `updates` (count, rows, columns), by Muon's Newton-Schulz iteration."""
    wide = updates if updates.shape[1] <= updates.shape[2] else updates.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if updates.shape[1] <= updates.shape[2] else x.mT


def muon_step(matrices: "list[Tensor]", momenta: "list[Tensor]", learning_rate: float) -> None:
    """One step of Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) on weights of one shape, in place.

    It needs a quarter of AdamW's steps here. torch.optim.Muon does the same in bfloat16, one matrix at a time, and is
    many times slower on a CPU.
    """
    import torch

    with torch.no_grad():
        for matrix, momentum in zip(matrices, momenta, strict=True):
            momentum.lerp_(cast("Tensor", matrix.grad), 0.05)
        nesterov = [cast("Tensor", w.grad).lerp(m, 0.95) for w, m in zip(matrices, momenta, strict=True)]
        for matrix, update in zip(matrices, orthogonal(torch.stack(nesterov)), strict=True):
            matrix.mul_(1 - 0.01 * learning_rate)
            # 0.2 * sqrt(longer side): updates as large as AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
            matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * learning_rate)
            matrix.grad = None


def batches(lengths: list[int], size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of each step's batch: every epoch in a new order, rows of like length together."""
    rng = Random(seed)
    queue: list[list[int]] = []
    for _ in range(steps):
        if not queue:
            order = rng.sample(range(len(lengths)), len(lengths))
            pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
            pools = [sorted(pool, key=lambda row: lengths[row]) for pool in pools]
            queue = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
            rng.shuffle(queue)
        yield queue.pop()


def pretrain(model: "LlamaForCausalLM", rows: list[tuple[list[int], list[bool]]], pad: int, params: Tiny) -> float:
    """Train on the assistant's turns: Muon for the layers' matrices, AdamW for the rest, linear warm-up and decay.

    Returns the mean loss (nats a token) of the last tenth of the steps.
    """
    import torch
    from tqdm import tqdm

    groups: dict[torch.Size, list[Tensor]] = {}
    rest: list[Tensor] = []
    for name, weight in model.named_parameters():
        (groups.setdefault(weight.shape, []) if name.endswith("_proj.weight") else rest).append(weight)
    momenta = {shape: [torch.zeros_like(w) for w in weights] for shape, weights in groups.items()}
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    losses: list[float] = []
    warmup, decay = max(1, WARMUP * params.max_steps), max(1, DECAY * params.max_steps)
    model.train()
    plan = batches([len(row) for row, _ in rows], params.per_device_train_batch_size, params.max_steps, params.seed)
    for step, picked in enumerate(tqdm(plan, "pretraining the tiny base", params.max_steps, unit="step")):
        ids, labels = batch_of([rows[i] for i in picked], pad)
        said = labels[:, 1:] != -100
        with autocast():
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[said])  # three quarters of the tokens need no logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][said])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min((step + 1) / warmup, 1.0, (params.max_steps - step) / decay)
        for shape, weights in groups.items():
            muon_step(weights, momenta[shape], share * params.learning_rate)
        adamw.param_groups[0]["lr"] = share * EMBEDDING_LEARNING_RATE
        adamw.step()
        adamw.zero_grad()
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
    """Train tokenizer and model and save both in `directory`; how well the model does on held-out chats.

    The same parameters give the same bytes on the same machine with the same number of threads.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed

    chats = conversations(params.seed, params.conversations + HELD_OUT)
    train, held_out = chats[:-HELD_OUT], chats[-HELD_OUT:]
    tokenizer = train_tokenizer([m["content"] for chat in train for m in chat], params.vocab_size)
    bos, pad, eot = cast("list[int]", tokenizer.convert_tokens_to_ids([BOS, END_OF_TEXT, EOT]))
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
        initializer_range=0.05,
        bos_token_id=bos,
        eos_token_id=eot,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    initialise(model)
    loss = pretrain(model, [encode(tokenizer, chat) for chat in train], pad, params)
    model.bfloat16()
    metrics = {"loss": loss, **accuracy(model, tokenizer, held_out)}
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[eot, pad], pad_token_id=pad, do_sample=False
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return metrics
