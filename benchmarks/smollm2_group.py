"""Trainings of SmolLM2 side by side on one card, and the scores of what they trained.

One training leaves a card idle: its time is the launching of small kernels, and processes side by side get in each
other's way. So the jobs of a group share the frozen base and one forward pass, each with an adapter of its own
(`grouped_linear`). `check` compares losses and adapters of such a group with TRL's.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.smollm2_folds import Config, Job, parameters
from pipeline.core.example import Example
from pipeline.core.labels import LABELS
from pipeline.core.question import Question
from pipeline.models.chat import read_template
from pipeline.models.encoder import Encoder
from pipeline.scoring.protocols import PROTOCOLS, Protocol
from pipeline.sections.evaluate import ProtocolName
from pipeline.training.lora import quantized_lora
from pipeline.training.trainer import build_trainer

BATCH = 50  # of prompts that are scored together
CHUNK = 4  # of each job's examples in one forward pass: 40 of ten jobs take about 30 GB
Scores = dict[str, list[float]]  # PMID -> log-probabilities of LABELS
Factors = dict[str, tuple[Any, Any]]  # layer -> LoRA's A (jobs, r, in) and B (jobs, out, r)


def form_ids(encoder: Encoder, protocol: Protocol) -> list[list[int]]:
    """The token ids of each label's forms; each is one token in this vocabulary."""
    ids = [[encoder.ids(form) for form in protocol.forms(label)] for label in LABELS]
    if any(len(form) != 1 for forms in ids for form in forms):
        raise ValueError("a label takes more than one token in this vocabulary; choose another base")
    return [[form[0] for form in forms] for forms in ids]


def padded(rows: Sequence[Sequence[float]]) -> Any:
    """The rows as one tensor (rows, tokens), with zeros behind the shorter ones."""
    import torch

    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def label_weights(examples: list[Example]) -> dict[str, float]:
    """Label -> weight that makes all labels count the same, 1 on average over the examples."""
    counts = {label: sum(example.label == label for example in examples) for label in LABELS}
    return {label: len(examples) / (len(LABELS) * max(1, count)) for label, count in counts.items()}


def token_weights(example: Example, config: Config, of_label: dict[str, float]) -> list[float]:
    """The weight of each token in the loss: 0 for the prompt, the decision's, and that of the rest."""
    scale = of_label[example.label] if config.balanced else 1.0
    rest = len(example.input_ids) - example.prompt_tokens - 1
    return [0.0] * example.prompt_tokens + [scale * config.decision] + [scale * config.conclusion] * rest


def grouped_linear(weight: Any, factors: tuple[Any, Any], scaling: float) -> Any:
    """A module: a frozen linear layer with an adapter for each job.

    weight (out, in); factors A (jobs, r, in) and B (jobs, out, r); input (jobs * rows, tokens, in), job by job.
    """
    import torch

    class GroupedLinear(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            a, b = factors
            update = x.reshape(a.shape[0], -1, x.shape[-1]) @ a.mT @ b.mT
            return torch.nn.functional.linear(x, weight).add_(update.view(*x.shape[:-1], -1), alpha=scaling)

    return GroupedLinear()


def adapted(model: Any) -> dict[str, Any]:
    """Layer -> module of each layer of PEFT's `model` that has an adapter."""
    return {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}


class Study:
    """The base in its two precisions, and what trains and scores with them."""

    def __init__(self, directory: Path) -> None:
        import torch
        from bitsandbytes.functional import dequantize_4bit
        from transformers import AutoModelForCausalLM

        self.directory, self.encoder = directory, Encoder(directory)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        peft_model, _ = quantized_lora(parameters(Config(), 1, 500), directory)
        weights = {name: layer.base_layer.weight for name, layer in adapted(peft_model).items()}
        # What bitsandbytes multiplies with, in float32, shape (out, in).
        self.nf4 = {name: dequantize_4bit(weight.data, weight.quant_state).float() for name, weight in weights.items()}
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.plain = model.to(self.device).requires_grad_(False)  # evaluated, its projections replaced by turns
        self.wide = {name: self.plain.get_submodule(name).weight.clone() for name in self.nf4}

    def collate(self, chosen: list[tuple[Example, list[float]]]) -> Any:
        """Ids and mask (rows, tokens); row, place and weight of each token that has one."""
        rows = [example.input_ids for example, _ in chosen]
        weights = padded([weights for _, weights in chosen])
        row, place = weights.nonzero(as_tuple=True)
        parts = padded(rows), padded([[1] * len(ids) for ids in rows]), row, place, weights[row, place]
        return [part.to(self.device) for part in parts]

    def train(self, jobs: list[Job], training: list[list[Example]], start: Any = None) -> tuple[Factors, list[Any]]:
        """Train the jobs, all with the same epochs, rank, alpha and batch, each on its examples; step by step together.

        Returns the adapters, and each step's losses (jobs,). `start`: layer -> A to begin from.
        """
        import torch

        config = jobs[0].config
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        size = sum(config.r * sum(weight.shape) for weight in self.nf4.values())
        values = torch.zeros(len(jobs), size, device=self.device)
        gradients, first, second = (torch.zeros_like(values) for _ in range(3))
        factors: Factors = {}
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        at = 0
        for name, weight in self.nf4.items():
            out, inside = weight.shape
            pair = []
            for shape in ((config.r, inside), (out, config.r)):
                part = slice(at, at + shape[0] * shape[1])
                leaf = values[:, part].unflatten(1, shape).detach().requires_grad_()
                leaf.grad = gradients[:, part].unflatten(1, shape)  # what backward adds to, in place
                pair.append(leaf)
                at = part.stop
            bound = inside**-0.5  # PEFT's kaiming_uniform_ with a = sqrt(5)
            with torch.no_grad():
                for number, generator in enumerate(generators):
                    drawn = (2 * torch.rand(config.r, inside, generator=generator) - 1) * bound
                    pair[0][number] = start[name] if start else drawn.to(self.device)
            factors[name] = (pair[0], pair[1])
        model = self.grouped(factors, config.lora_alpha / config.r)

        rates = torch.tensor([job.config.learning_rate for job in jobs], device=self.device)[:, None]
        per_epoch = -(-len(training[0]) // config.batch)
        total, warm_up = config.epochs * per_epoch, 5
        shufflers = [random.Random(job.seed) for job in jobs]
        of_label = [label_weights(examples) for examples in training]
        history: list[Any] = []
        orders = training
        for step in range(total):
            if step % per_epoch == 0:
                orders = [rng.sample(rows, len(rows)) for rng, rows in zip(shufflers, training, strict=True)]
            begin = step % per_epoch * config.batch
            losses = torch.zeros(len(jobs), device=self.device)
            batches = []
            for job, order, by_label in zip(jobs, orders, of_label, strict=True):
                batch = sorted(order[begin : begin + config.batch], key=lambda example: example.prompt_tokens)
                weights = [token_weights(example, job.config, by_label) for example in batch]
                share = sum(map(sum, weights))
                batches.append([(e, [w / share for w in ws]) for e, ws in zip(batch, weights, strict=True)])
            for chunk in range(0, len(batches[0]), CHUNK):  # of about one length
                chosen = [pair for batch in batches for pair in batch[chunk : chunk + CHUNK]]
                ids, mask, row, place, weights = self.collate(chosen)
                hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[row, place - 1])
                each = torch.nn.functional.cross_entropy(logits, ids[row, place], reduction="none") * weights
                each.sum().backward()
                losses.index_add_(0, row // (len(chosen) // len(jobs)), each.detach())
            history.append(losses)
            factor = step / warm_up if step < warm_up else (total - step) / (total - warm_up)
            with torch.no_grad():  # AdamW without decay, on all jobs at once, each clipped by its own norm
                gradients.mul_((1 / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))
                first.lerp_(gradients, 0.1)
                second.lerp_(gradients.square(), 0.001)
                denominator = (second / (1 - 0.999 ** (step + 1))).sqrt().add_(1e-8)
                values.sub_(rates * factor * (first / (1 - 0.9 ** (step + 1))) / denominator)
                gradients.zero_()
        torch.backends.cuda.matmul.allow_tf32 = False
        return factors, history

    def grouped(self, factors: Factors, scaling: float) -> Any:
        """The 4-bit base's values with the jobs' adapters beside them; shares embedding and norms with `plain`."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.directory))
        parts = {name: grouped_linear(self.nf4[name], pair, scaling) for name, pair in factors.items()}
        others = dict(self.plain.named_parameters())
        parts |= {name: others[name] for name in others if name.removesuffix(".weight") not in factors}
        for name, part in parts.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, part)
        model.model.rotary_emb = self.plain.model.rotary_emb
        model.lm_head.weight = self.plain.lm_head.weight
        return model

    def scores(self, protocol: ProtocolName, prompts: dict[str, list[int]]) -> Scores:
        """PMID -> log-probabilities of LABELS after each prompt, from `plain` as it is now."""
        import torch

        forms = form_ids(self.encoder, PROTOCOLS[protocol])
        found: Scores = {}
        order = sorted(prompts, key=lambda pmid: len(prompts[pmid]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            ids = padded([prompts[pmid] for pmid in chosen]).to(self.device)
            mask = padded([[1] * len(prompts[pmid]) for pmid in chosen]).to(self.device)
            with torch.inference_mode():
                hidden = self.plain.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                last = hidden[torch.arange(len(chosen), device=self.device), mask.sum(1) - 1]
                logs = self.plain.lm_head(last).float().log_softmax(-1)
                labels = torch.stack([logs[:, form].logsumexp(-1) for form in forms], 1).tolist()
            found |= {pmid: [round(x, 4) for x in values] for pmid, values in zip(chosen, labels, strict=True)}
        return {pmid: found[pmid] for pmid in prompts}

    def answers(self, factors: Factors, number: int, scaling: float, held_out: list[Example]) -> dict[str, Scores]:
        """The held-out examples' scores by one job's adapter, folded into either base."""
        import torch

        prompts = {example.pmid: example.input_ids[: example.prompt_tokens] for example in held_out}
        found: dict[str, Scores] = {}
        for kind, base in (("merged", self.wide), ("nf4", self.nf4)):
            with torch.no_grad():
                for name, (a, b) in factors.items():
                    folded = base[name] + scaling * (b[number] @ a[number])
                    folded = folded.bfloat16() if kind == "merged" else folded
                    self.plain.get_submodule(name).weight.copy_(folded)
            found[kind] = self.scores("chat", prompts)
        return found

    def base(self, questions: list[Question]) -> dict[str, Scores]:
        """The untuned base's scores in each protocol; before any `answers`."""
        template = read_template(self.directory)
        found: dict[str, Scores] = {}
        for name, protocol in PROTOCOLS.items():
            asked = {question.pmid: protocol.prompt(question) for question in questions}
            texts = {pmid: ask if isinstance(ask, str) else template.prompt(ask) for pmid, ask in asked.items()}
            found[name] = self.scores(name, {pmid: self.encoder.ids(text) for pmid, text in texts.items()})
        return found


def check(directory: Path, examples: list[Example]) -> None:
    """Train the 8 shortest examples for 6 steps with TRL, and twice in a group; print the losses and how B differs.

    One batch, so that both see it in every step whatever the order; A begins with TRL's own draw.
    """
    import torch
    from transformers import set_seed

    chosen = sorted(examples, key=lambda example: example.prompt_tokens)[:8]
    config = Config(epochs=6, tf32=False)
    params = parameters(config, 1, len(chosen))
    set_seed(params.seed)
    model, tokenizer = quantized_lora(params, directory)
    layers = adapted(model)
    start = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers.items()}
    with tempfile.TemporaryDirectory() as work:
        trainer = build_trainer(params, model, tokenizer, chosen, chosen[:1], Path(work))
        trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    jobs = [Job(replace(config, learning_rate=5e-4), 1, 0), Job(config, 1, 0)]
    factors, history = Study(directory).train(jobs, [chosen, chosen], start)
    ours = [losses[1].item() for losses in history]
    of_trl = torch.cat([layer.lora_B["default"].weight.flatten() for layer in layers.values()])
    of_group = torch.cat([factors[name][1][1].flatten() for name in layers])
    print("TRL    ", [round(loss, 4) for loss in theirs])
    print("grouped", [round(loss, 4) for loss in ours])
    print(f"relative difference of B after {len(ours)} steps: {torch.dist(of_group, of_trl) / of_trl.norm():.1e}")
