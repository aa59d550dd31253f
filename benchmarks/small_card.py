"""Show which GGUF of Llama-3-8B's shape a GPU of 4 GB holds whole, how fast it is, and what the larger file does there.

    python -m benchmarks.small_card --tokenizer DIR --pubmedqa DIR       one CUDA card, llama.cpp with GGML_CUDA_FA
    python -m benchmarks.small_card ... --shape tiny --room-mib 0        to try it on a CPU: nothing is filled

The files have the types and shapes of Llama-3-8B, as the quantizer's dry run lists them, and blocks of random weights
over and over: neither speed nor memory depends on the values. Each measurement has a process of its own. It creates
the CUDA context, fills the card until --room-mib are free, then loads. `ask` answers PubMedQA's longest
question there; the settings of RUN.md are measured beside it. Every figure is printed and recorded as soon as it is
known.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import LOGS
from benchmarks.record import Figures, record
from benchmarks.rehearsal import CONFIG, TINY, TOKENIZER
from benchmarks.scoring import GENERATED, seconds, vram_used
from pipeline.commands import ask
from pipeline.core.errors import Fail
from pipeline.models.gguf import run_converter
from pipeline.models.gguf_header import SYSTEM_PROMPT, Tensor, padded, read_header
from pipeline.models.memory import MIB, Load, Shape, gguf_vram, layers_that_fit, small_load
from pipeline.models.sizes import quantized
from pipeline.scoring.protocols import PROTOCOLS, messages
from pipeline.scoring.scorer import MAX_TAILS, N_UBATCH, Scorer

N_CTX = 2048
BLOCKS = 4099  # of 256 weights: a prime, so that no two rows of a matrix are equal
PROMPT = "You are a medical expert. Answer the following question truthfully and concisely."
UNITS = {
    "context_mib": "MiB",
    "free_before_mib": "MiB",
    "loaded_mib": "MiB",
    "vram_mib": "MiB",
    "prompt_tokens_per_s": "tokens/s",
    "generated_tokens_per_s": "tokens/s",
}
START = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def random_blocks(kind: str) -> bytes:
    """BLOCKS times 256 normal weights, in ggml's blocks of that type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from llama_cpp._ggml import libggml

    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    weights = np.random.default_rng(0).standard_normal(256 * BLOCKS, dtype=np.float32) * np.float32(0.02)
    result = ctypes.create_string_buffer(weights.size // block * size)
    importance = np.ones(256, dtype=np.float32)
    libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (weights, importance)]
    rows = [ctypes.c_int64(value) for value in (0, BLOCKS, 256)]
    written = libggml.ggml_quantize_chunk(ctypes.c_int(number), pointers[0], result, *rows, pointers[1])
    assert written == len(result), (kind, written, len(result))
    return result.raw


def read_metadata(vocabulary: Path) -> list[tuple[str, Any, Any, Any]]:
    """Name, value and type of each key of a GGUF that is not of its weights, and an array's inner type."""
    from gguf import GGUFReader, GGUFValueType

    own = ("GGUF.", "general.architecture", "general.file_type", "llama.")
    fields = [field for field in GGUFReader(vocabulary).fields.values() if not field.name.startswith(own)]
    return [
        (field.name, field.contents(), field.types[0], field.types[-1] if GGUFValueType.ARRAY in field.types else None)
        for field in fields
    ]


def write_model(path: Path, metadata: Any, quant_type: str, tensors: Mapping[str, Tensor], config: Any) -> None:
    """A GGUF of that type with that metadata: valid blocks, repeated."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, "llama")
    for name, value, kind, inner in metadata:
        writer.add_key_value(name, value, kind, sub_type=inner)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{quant_type}"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor.bytes, GGMLQuantizationType[tensor.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    pools = {kind: random_blocks(kind) for kind in {tensor.type for tensor in tensors.values()} - {"F32"}}
    with path.open("ab") as file:
        file.write(bytes(padded(file.tell(), 32) - file.tell()))
        for tensor in tensors.values():
            pool = pools.get(tensor.type) or np.ones(tensor.shape[0], dtype=np.float32).tobytes()
            whole, rest = divmod(tensor.bytes, len(pool))
            for _ in range(whole):
                file.write(pool)
            file.write(pool[:rest])
            file.write(bytes(padded(tensor.bytes, 32) - tensor.bytes))
    read_header(path)  # raises `Fail` if it is not complete


def write_files(directory: Path, tokenizer: Path, config: dict[str, Any], types: list[str]) -> dict[str, Path]:
    """Type -> a GGUF of it, the first as models/medical-reasoner.gguf and the others in models/quantized."""
    source = directory / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER:
        (source / name).write_bytes((tokenizer / name).read_bytes())
    vocabulary = directory / "vocabulary.gguf"
    run_converter(source, vocabulary, {"metadata": {SYSTEM_PROMPT: PROMPT}, "vocab_only": True}, "the tokenizer")
    say("vocabulary converted")
    metadata = read_metadata(vocabulary)
    listed = quantized(Shape.of_config(config, "config.json"), types, matrix=True)
    paths: dict[str, Path] = {}
    for index, quant_type in enumerate(types):
        name = "medical-reasoner.gguf" if not index else f"quantized/medical-reasoner.{quant_type}.gguf"
        paths[quant_type] = path = directory / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_model(path, metadata, quant_type, listed[quant_type], config)
        say(f"{quant_type}: {path.stat().st_size / MIB:,.0f} MiB written")
    return paths


def longest_question(pubmedqa: Path, vocabulary: Path) -> tuple[str, str, int]:
    """Question and abstract of PubMedQA with the most tokens, and the tokens of its prompt."""
    from pipeline.models.vocabulary import Vocabulary

    records = json.loads((pubmedqa / "ori_pqal.json").read_text(encoding="utf-8")).values()
    texts = [(record["QUESTION"], "\n\n".join(record["CONTEXTS"])) for record in records]
    with Vocabulary(vocabulary, "", vocab_only=True) as model:
        lengths = [len(model.tokenize(model.template.prompt(messages(PROMPT, *text)))) for text in texts]
    best = int(np.argmax(lengths))
    return *texts[best], lengths[best]


class Card:
    """The first CUDA card through its driver, which is there wherever llama.cpp runs on it; nothing on a CPU."""

    def __init__(self) -> None:
        """Create the primary context, the one that llama.cpp will use."""
        before = vram_used() * 1024
        try:
            self.cuda: Any = ctypes.CDLL("libcuda.so.1")
        except OSError:
            self.cuda = None
            self.context_mib = 0.0
            return
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.context_mib = vram_used() * 1024 - before

    def call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.cuda, name)(*arguments):
            raise RuntimeError(f"{name} returned {status}")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if self.cuda:
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def fill(self, room_mib: int) -> None:
        """Allocate plain device memory, never to be freed, until `room_mib` are free."""
        while self.cuda and (more := self.memory()[0] - room_mib * MIB) >= 2 * MIB:
            pointer = ctypes.c_uint64()
            size = min(more, 4096 * MIB) // (2 * MIB) * 2 * MIB
            self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))


class Small(Scorer):
    """With RUN.md's settings."""

    def context_params(self) -> Any:
        params = super().context_params()
        params.n_ubatch = small_load(N_CTX).n_ubatch
        params.n_outputs_max = 8  # one a prompt is read
        return params


def prepare_card(room_mib: int) -> tuple[Card, dict[str, float], float]:
    """The card, filled; its context's size and what is free."""
    card = Card()
    if room_mib:
        card.fill(room_mib)
    free = card.memory()[0] / MIB
    return card, {"context_mib": round(card.context_mib, 1), "free_before_mib": round(free, 1)}, free


def measure(gguf: Path, text: tuple[str, str], room_mib: int, layers: int, kind: str) -> dict[str, float]:
    """Load, answer and generate; MiB taken by each, and tokens/s. `kind` is small, scorer or default (f16, 512)."""
    os.environ["N_GPU_LAYERS"] = str(layers)
    card, found, free = prepare_card(room_mib)
    chat = PROTOCOLS["chat"]

    def taken() -> float:
        return round(free - card.memory()[0] / MIB, 1)

    start = time.perf_counter()
    made = Small if kind == "small" else Scorer
    with made(gguf, N_CTX, "free memory", "f16" if kind == "default" else "q8_0") as scorer:
        found |= {"loaded_mib": taken(), "load_s": round(time.perf_counter() - start, 1)}
        tokens, choices = scorer.encode(messages(PROMPT, *text), chat)

        def prompt() -> None:
            scorer.lib.llama_memory_clear(scorer.lib.llama_get_memory(scorer.context), True)
            scorer.decode(tokens, [], 0)
            scorer.lib.llama_synchronize(scorer.context)

        def generate() -> None:
            for i in range(GENERATED):
                scorer.decode([tokens[i]], [], len(tokens) + i)
                scorer.lib.llama_synchronize(scorer.context)

        scores, _ = scorer.score(tokens, choices)  # raises `Fail` if a logit is not finite
        assert all(np.isfinite(list(scores.values())))
        found["prompt_tokens_per_s"] = round(len(tokens) / min(seconds(prompt) for _ in range(3)), 1)
        generate()
        prompt()
        found["generated_tokens_per_s"] = round(GENERATED / seconds(generate), 1)
        found["vram_mib"] = taken()
    return found


def ask_there(gguf: Path, text: tuple[str, str], room_mib: int) -> dict[str, Any]:
    """What `ask --cache-type q8_0` prints on the filled card, or its error, and the MiB that it leaves free."""
    import contextlib
    import io

    os.environ["N_GPU_LAYERS"] = "999"
    _, found, _ = prepare_card(room_mib)
    printed, abstract = io.StringIO(), gguf.parent / "abstract.txt"
    abstract.write_text(text[1], encoding="utf-8")
    try:
        with contextlib.redirect_stdout(printed):
            ask.main(text[0], abstract, gguf, "q8_0")
    except Fail as error:
        return found | {"error": str(error)}
    return found | {"printed": printed.getvalue()[:500]}


def alone(function: Any, *arguments: Any) -> Any:
    """Call in a process of its own; None if it fails or dies, which is printed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, Fail, RuntimeError) as error:
            say(f"failed: {type(error).__name__}: {error}")
            return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help=f"a directory with {', '.join(TOKENIZER)}")
    parser.add_argument("--pubmedqa", type=Path, required=True, help="a directory with ori_pqal.json")
    parser.add_argument("--directory", type=Path, help="where the files are made and stay; left out: temporary, 9 GB")
    parser.add_argument("--types", default="Q4_K_M,IQ3_XS", help="the large one, then the small one")
    parser.add_argument("--room-mib", type=int, default=3550, help="free on the card; 0 fills nothing")
    parser.add_argument("--shape", choices=["llama3-8b", "tiny"], default="llama3-8b")
    options = parser.parse_args()
    config = CONFIG | (TINY if options.shape == "tiny" else {})
    figures: Figures = {}
    command = "python -m benchmarks.small_card --tokenizer DIR --pubmedqa DIR"

    def note(key: str, value: float | str, unit: str = "") -> None:
        figures[f"quantize.compact.{key}"] = (value, unit)  # pyright: ignore[reportArgumentType]
        say(f"quantize.compact.{key}: {value} {unit}".rstrip())

    def keep(label: str, found: Mapping[str, float]) -> None:
        for name, unit in UNITS.items():
            if name in found and (not label or name not in ("context_mib", "free_before_mib")):
                note(f"{label}.{name}" if label else name, found[name], unit)
        if options.shape != "tiny":
            record(figures, command, LOGS / "small_card.log", text="recorded")

    with tempfile.TemporaryDirectory() as temporary:
        directory = (options.directory or Path(temporary)).absolute()
        large, small = options.types.split(",")
        paths = write_files(directory, options.tokenizer, config, [large, small])
        *text, length = longest_question(options.pubmedqa, directory / "vocabulary.gguf")
        say(f"PubMedQA's longest question has {length} tokens")
        headers = {name: read_header(path) for name, path in paths.items()}
        shape, room = Shape.of_config(config, "config.json"), options.room_mib
        wide = Load(N_CTX, N_UBATCH, "f16", flash_attention=False, n_outputs=1 + MAX_TAILS)
        scorer = wide._replace(cache_type="q8_0", flash_attention=True)
        for label, name, load in (
            (f"{small}, RUN.md's settings", small, small_load(N_CTX)),
            (f"{small}, the scorer with q8_0", small, scorer),
            (f"{large}, RUN.md's settings", large, small_load(N_CTX)),
            (f"{large}, the scorer with f16", large, wide),
        ):
            say(f"predicted: {label}: {gguf_vram(headers[name].tensors, shape, load) / MIB:,.0f} MiB")

        def run(label: str, name: str, room_mib: int, layers: int, kind: str) -> dict[str, float] | None:
            say(f"{name}, {layers} layers, {kind}, {room_mib or 'all'} MiB free")
            found = alone(measure, paths[name], tuple(text), room_mib, layers, kind)
            say(json.dumps(found))
            keep(label, found or {})
            return found

        note("type", small)
        note("file_mib", round(paths[small].stat().st_size / MIB), "MiB")
        whole = run("", small, room, 999, "small")
        wrong: list[str] = []
        for name in (small, large):
            asked = alone(ask_there, paths[name], tuple(text), room)
            say(f"ask with {name}: {json.dumps(asked)}")
            error = (asked or {}).get("error", "")
            if room and (bool(error) != (name == large) or (error and paths[small].name not in error)):
                wrong.append(f"ask with {name} said: {error or 'an answer'}")
        load = small_load(N_CTX)
        fit = layers_that_fit(headers[large].tensors, shape, load, room * MIB) if room else shape.layers // 2
        offload = None
        for layers in range(fit, max(fit - 5, 0), -1):
            if offload := run("offload", large, room, layers, "small"):
                note("offload.layers", layers)
                break
        if whole and offload:
            ratio = whole["generated_tokens_per_s"] / offload["generated_tokens_per_s"]
            note("speedup_over_offload", round(ratio, 1))
        run("scorer", small, room, 999, "scorer")
        for name, kind in ((large, "default"), (large, "small"), (small, "small")):
            run(f"whole_card.{name.lower()}.{kind}", name, 0, 999, kind)
    if options.shape != "tiny":
        record(figures, command, LOGS / "small_card.log")
    if not whole:
        wrong.append(f"{small} did not fit {room} MiB")
    if wrong:
        sys.exit(f"small_card: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
