"""Memory and disk from the shapes of a model: pure arithmetic, no weights and no card.

A GGUF's needs follow from its header (`gguf_header.read_header`) or from `sizes.quantized`, which needs a configuration
only. The constants were fitted to figures of benchmarks/results.json; `python -m benchmarks.plan` compares all others.
"""

from collections.abc import Collection, Mapping
from math import prod
from typing import Any, NamedTuple, Self

from pipeline.core.errors import Fail
from pipeline.models.gguf_header import Header, Tensor, padded
from pipeline.sections.evaluate import CacheType
from pipeline.sections.train import Train

MIB, GIB = 1 << 20, 1 << 30
RESERVED = 546 * MIB  # of a card, by a desktop and a CUDA context: of 4,096 MiB about 3,550 are left
CARDS = (4, 6, 8, 12, 16, 24)  # GiB of cards as they are sold
CACHE_BITS = {"f16": 16.0, "q8_0": 8.5}  # of a number
TOKEN_BYTES = 40  # of a token's text, type and merges in a GGUF's metadata: 24 of 1,024 tokens, 61 in Llama 3
PROCESS = int(0.2 * GIB)  # anonymous memory of Python and its libraries
CUDA_PROCESS = int(1.7 * GIB)  # the same with torch on a card
PER_WIDEST = 4.3  # memory of converter and quantizer, in sizes of the largest matrix at 16 bits
CHECKPOINTS = 2  # that are kept, of adapter and optimizer
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


class Fitted(NamedTuple):
    """What of training's VRAM does not follow from shapes; `python -m benchmarks.plan` fits it."""

    unsloth: float  # GiB beside weights and activations: buffers of the allocator, of bitsandbytes and of the loss
    trl: float  # the same
    unsloth_layers: float  # whose activations are held at once with gradient checkpointing
    trl_layers: float  # the same
    padded: float  # length of a micro-batch of PubMedQA over that of the longest example


FITTED = Fitted(unsloth=0.394, trl=1.333, unsloth_layers=1.556, trl_layers=6.06, padded=0.666)


class Shape(NamedTuple):
    """The sizes of a dense decoder as Llama has it."""

    layers: int
    hidden: int
    inner: int  # of the MLP
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int  # tokens
    tied: bool  # the output matrix is the embedding

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str) -> Self:
        """The shape in a config.json; raises `Fail` naming `name` if it is of another kind of model."""
        missing = [key for key in REQUIRED if not isinstance(config.get(key), int)]
        experts = [key for key in config if "experts" in key and config[key]]
        if missing or experts:
            why = f"has no {', '.join(missing)}" if missing else f"has {', '.join(experts)}"
            raise Fail(f"{name} {why}: only dense decoders such as Llama can be planned; `dvc repro` may still work")
        hidden, inner, layers, heads, vocabulary = (config[key] for key in REQUIRED)
        kv_heads = config.get("num_key_value_heads") or heads
        tied = bool(config.get("tie_word_embeddings", False))
        return cls(layers, hidden, inner, heads, kv_heads, config.get("head_dim") or hidden // heads, vocabulary, tied)

    @classmethod
    def of_gguf(cls, header: Header) -> Self:
        """The shape of a GGUF of that header."""
        facts, architecture = header.metadata, header.metadata["general.architecture"]

        def fact(key: str, default: int | None = None) -> int:
            return facts[f"{architecture}.{key}"] if default is None else facts.get(f"{architecture}.{key}", default)

        hidden, heads = fact("embedding_length"), fact("attention.head_count")
        return cls(
            layers=fact("block_count"),
            hidden=hidden,
            inner=fact("feed_forward_length"),
            heads=heads,
            kv_heads=fact("attention.head_count_kv", heads),
            head_width=fact("attention.key_length", hidden // heads),
            vocabulary=header.tensors["token_embd.weight"].shape[1],
            tied="output.weight" not in header.tensors,
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """transformers' name of each linear layer of a block -> inputs and outputs."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, which are those of the output matrix."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        block = sum(map(prod, self.linear.values())) + 2 * self.hidden
        return self.layers * block + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def activations(self) -> int:
        """Numbers that the backward pass of a block needs for a token: norms, queries, keys, values, MLP."""
        return 4 * self.hidden + 2 * self.kv_heads * self.head_width + 2 * self.inner


class Load(NamedTuple):
    """How llama.cpp loads a GGUF, by its own names."""

    n_ctx: int  # tokens
    n_ubatch: int  # tokens
    cache_type: CacheType
    flash_attention: bool
    n_outputs: int  # tokens with logits, of one `n_ubatch`


def small_load(n_ctx: int) -> Load:
    """The settings of RUN.md, for the smallest cards: `-fa on -ctk q8_0 -ctv q8_0 -ub 128`."""
    return Load(n_ctx, 128, "q8_0", flash_attention=True, n_outputs=128)


def file_size(tensors: Mapping[str, Tensor], shape: Shape) -> int:
    """Bytes of a GGUF: its tensors, each padded, and a vocabulary like Llama 3's."""
    return sum(padded(tensor.bytes, 32) for tensor in tensors.values()) + TOKEN_BYTES * shape.vocabulary


def compute_size(shape: Shape, load: Load) -> int:
    """Bytes of llama.cpp's compute buffer: the largest of its logits, an MLP, and attention without flash attention.

    Fitted to what llama.cpp reports for its buffer, within 10 %; a test repeats that.
    """
    logits = load.n_outputs * shape.vocabulary + 2 * load.n_ubatch * shape.hidden
    mlp = load.n_ubatch * (2 * shape.inner + 6.5 * shape.hidden + load.n_ctx / 2)
    scores = load.n_ubatch * ((shape.heads + 1) * load.n_ctx + 5.5 * shape.hidden)
    return round(4 * max(logits, mlp, 0 if load.flash_attention else scores))


def gguf_vram(tensors: Mapping[str, Tensor], shape: Shape, load: Load, layers: int | None = None) -> int:
    """Bytes on a card of a GGUF with its last `layers` (None: all) there; context and desktop come on top.

    llama.cpp counts the output as a layer, keeps the embedding in main memory, and copies a tied one to the card.
    """
    first = 0 if layers is None else max(shape.layers + 1 - layers, 0)
    offloaded = [f"blk.{layer}." for layer in range(first, shape.layers)]
    names = ["token_embd.weight" if shape.tied else "output.weight", "output_norm.weight"]
    weights = sum(
        tensor.bytes for name, tensor in tensors.items() if name in names or name.startswith(tuple(offloaded))
    )
    cached = 2 * shape.kv_heads * shape.head_width * padded(load.n_ctx, 256)  # keys and values of a layer
    cache = round(cached * CACHE_BITS[load.cache_type] / 8)
    return weights + len(offloaded) * cache + compute_size(shape, load)


def layers_that_fit(tensors: Mapping[str, Tensor], shape: Shape, load: Load, room: int) -> int:
    """The most layers, of `shape.layers` + 1, that fit `room` bytes of a card; 0 if none do."""
    counts = range(shape.layers + 1, 0, -1)
    return next((count for count in counts if gguf_vram(tensors, shape, load, count) <= room), 0)


def adapter_parameters(shape: Shape, params: Train) -> int:
    """Parameters of a LoRA adapter; 0 for a target that is in no block."""
    targets = [shape.linear.get(name.rpartition(".")[2], (0, 0)) for name in params.target_modules]
    return shape.layers * params.r * sum(map(sum, targets))


def optimizer_bytes(params: Train) -> int:
    """Bytes of optimizer state for a parameter of the adapter."""
    return 8 if params.optim == "adamw_torch" else 2


def training_vram(shape: Shape, params: Train, longest: int, fitted: Fitted = FITTED) -> int:
    """Bytes that torch reserves on a card for QLoRA with examples of at most `longest` tokens; the context is on top.

    Unsloth keeps its gradient checkpoints in main memory. PEFT casts embedding and output to float32 for TRL.
    """
    unsloth = params.backend == "unsloth"
    width = 4 if params.dtype == "float32" else 2
    wide = 2 if unsloth and width == 2 else 4
    blocks = shape.parameters - shape.embedding * (1 if shape.tied else 2)
    weights = blocks * (0.5 + (0.016 if params.bnb_4bit_use_double_quant else 0.0625))
    weights += wide * shape.embedding * (2 - shape.tied - params.offload_embedding)
    adapter = adapter_parameters(shape, params) * (4 + 4 + optimizer_bytes(params))
    recomputed = fitted.unsloth_layers if unsloth else fitted.trl_layers
    layers = recomputed if params.gradient_checkpointing else shape.layers
    token = layers * width * shape.activations
    if params.gradient_checkpointing and not unsloth:
        token += shape.layers * shape.hidden * 4
    activations = params.per_device_train_batch_size * fitted.padded * longest * token
    return round(weights + adapter + activations + GIB * (fitted.unsloth if unsloth else fitted.trl))


class Needs(NamedTuple):
    """What a stage needs at its peak, in bytes."""

    disk: int  # of project and weights, everything that is there at that time
    memory: int  # anonymous: mapped files come on top where there is room


def stages(
    shape: Shape, phases: Mapping[str, Train], fetched: int, files: list[int], optional: Collection[str], on_card: bool
) -> dict[str, Needs]:
    """Stage -> its needs, for GGUF files of those sizes; the base is measured with the first one.

    `phases` are the stages that train, `optional` those of `reference` and `generate` that are on, `fetched` the bytes
    of weights that are downloaded. Scoring on a card keeps the KV cache there.
    """
    wide = 2 * shape.parameters  # merged weights, and a temporary 16-bit GGUF
    widest = 2 * max(shape.embedding, *map(prod, shape.linear.values()))
    build, score = PROCESS + round(PER_WIDEST * widest), 2 * PROCESS
    needs = {"baseline": Needs(fetched + wide + files[0], build)}  # before train: no merged model lies beside it
    kept = fetched
    for stage, params in phases.items():
        adapter = 4 * adapter_parameters(shape, params)
        kept += adapter
        state = adapter + adapter_parameters(shape, params) * optimizer_bytes(params)
        host = 2 * shape.embedding if params.offload_embedding else 0
        training = CUDA_PROCESS + host if on_card else PROCESS + training_vram(shape, params, params.max_length)
        needs[stage] = Needs(kept + CHECKPOINTS * state, training)
    needs["merge"] = Needs(kept := kept + wide, PROCESS + widest)
    needs["quantize"] = Needs((kept := kept + sum(files)) + wide, build)
    needs["evaluate"] = Needs(kept, score)
    more = {"reference": Needs(kept + wide, build), "generate": Needs(kept + wide + files[0], build)}
    return needs | {stage: need for stage, need in more.items() if stage in optional}
