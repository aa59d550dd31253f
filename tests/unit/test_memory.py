"""What a model needs by its shapes: against llama.cpp's own figures, and against measured ones."""

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.plan import BOUNDS, SHAPE, comparisons, figures, fit, left_out, rehearsal, trainings
from pipeline.core.errors import Fail
from pipeline.models.gguf import quantize
from pipeline.models.gguf_header import read_header
from pipeline.models.memory import (
    FITTED,
    GIB,
    MIB,
    RESERVED,
    Load,
    Shape,
    adapter_parameters,
    compute_size,
    gguf_vram,
    layers_that_fit,
    small_load,
    stages,
)
from pipeline.models.sizes import quantized, write_sparse

SMALL = Shape(layers=2, hidden=256, inner=512, heads=4, kv_heads=2, head_width=64, vocabulary=1024, tied=False)
ODD = Shape(layers=3, hidden=576, inner=1536, heads=9, kv_heads=3, head_width=64, vocabulary=2048, tied=True)
WIDE = Shape(layers=2, hidden=2048, inner=5632, heads=32, kv_heads=4, head_width=64, vocabulary=32000, tied=False)
# Llama-3-8B: MiB of all tensors, of the embedding, and on the card with 2,048 tokens, by hand from the quantizer's log
TABLE = {
    "Q4_K_M": (4685, 282, 4604),
    "IQ4_XS": (4269, 266, 4204),
    "Q3_K_M": (3825, 215, 3811),
    "IQ3_M": (3602, 215, 3588),
    "IQ3_XS": (3348, 215, 3334),
}


@pytest.mark.parametrize("shape", [SMALL, ODD])
@pytest.mark.parametrize("quant_type", ["Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_without_weights_the_tensors_are_those_of_the_real_quantizer(shape: Shape, quant_type: str, tmp_path: Path):
    source, target = tmp_path / "wide.gguf", tmp_path / "small.gguf"
    write_sparse(source, shape)
    assert source.stat().st_blocks * 512 < source.stat().st_size / 10
    quantize(source, target, quant_type, {})
    header = read_header(target)
    assert Shape.of_gguf(header) == shape
    found = {name: tensor._replace(offset=0) for name, tensor in header.tensors.items()}
    assert quantized(shape, [quant_type], matrix=False)[quant_type] == found
    odd_rows = [len(tensor.shape) > 1 and tensor.shape[0] % 256 > 0 for tensor in found.values()]
    assert sum(header.fallbacks.values()) == sum(odd_rows)


@pytest.mark.parametrize(("quant_type", "expected"), TABLE.items())
def test_the_files_of_llama_3_8b(quant_type: str, expected: tuple[int, int, int]):
    tensors = quantized(SHAPE, [quant_type], matrix=False)[quant_type]
    found = [
        sum(tensor.bytes for tensor in tensors.values()),
        tensors["token_embd.weight"].bytes,
        gguf_vram(tensors, SHAPE, small_load(2048)),
    ]
    assert [size / MIB for size in found] == pytest.approx(expected, abs=3)
    assert (found[2] <= 4 * GIB - RESERVED) == (quant_type == "IQ3_XS")


def test_an_importance_matrix_changes_what_llama_cpp_chooses():
    without, with_matrix = (quantized(SHAPE, ["IQ3_XXS"], matrix)["IQ3_XXS"] for matrix in (False, True))
    assert sum(row.bytes for row in with_matrix.values()) < sum(row.bytes for row in without.values())


def test_only_what_fits_goes_to_the_card_and_a_tied_output_is_a_copy():
    tensors, load = quantized(SMALL, ["Q8_0"], matrix=False)["Q8_0"], small_load(512)
    steps = [gguf_vram(tensors, SMALL, load, layers) for layers in range(1, SMALL.layers + 2)]
    assert steps == sorted(steps)
    assert steps[-1] == gguf_vram(tensors, SMALL, load)
    assert [layers_that_fit(tensors, SMALL, load, size) for size in (steps[0] - 1, *steps)] == [0, 1, 2, 3]
    tied = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
    assert gguf_vram(tied, SMALL._replace(tied=True), load) == steps[-1]


LOADS = [
    Load(n_ctx, n_ubatch, "q8_0" if flash else "f16", flash, n_outputs)
    for n_ctx in (2048, 8192)
    for n_ubatch in (128, 512)
    for flash in (True, False)
    for n_outputs in (1, n_ubatch)
]


def test_compute_and_cache_are_what_llama_cpp_reserves(tmp_path: Path):
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    source, lines = tmp_path / "wide.gguf", [""]
    write_sparse(source, WIDE)

    @llama_cpp.llama_log_callback
    def note(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        lines[0] += text.decode()

    llama_cpp.llama_log_set(note, ctypes.c_void_p())
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(bytes(source), params)
    for load in LOADS:
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = load.n_ctx
        context.n_ubatch, context.n_outputs_max = load.n_ubatch, load.n_outputs
        context.flash_attn_type = int(load.flash_attention)
        context.type_k = context.type_v = {"f16": 1, "q8_0": 8}[load.cache_type]
        lines[0] = ""
        made = llama_cpp.llama_init_from_model(model, context)
        llama_cpp.llama_free(made)
        compute, cache = (
            float(re.findall(rf"{name} size = +([\d.]+) MiB", lines[0])[-1]) for name in ("compute buffer", "KV buffer")
        )
        empty = gguf_vram({}, WIDE, load) - compute_size(WIDE, load)
        assert compute_size(WIDE, load) / MIB == pytest.approx(compute, rel=0.1), load
        assert empty / MIB == pytest.approx(cache, abs=0.01), load
    llama_cpp.llama_model_free(model)
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p())


def test_predictions_are_within_their_bounds_of_what_was_measured():
    wrong = [row for row in comparisons() if abs(row.error) > BOUNDS[row.kind]]
    assert not wrong
    assert {row.kind for row in comparisons() if row.held_out} == BOUNDS.keys()


def test_the_constants_are_the_fit_and_predict_each_training_that_is_left_out():
    rows = trainings(figures(), rehearsal())
    assert fit(row for row in rows if not row.held_out) == pytest.approx(FITTED, rel=0.02)
    assert {name for name, error in left_out(rows).items() if abs(error) > BOUNDS["VRAM"]} == set()


def test_a_first_phase_a_reference_answers_and_another_file_take_disk():
    train, wide = rehearsal()["train"], 2 * SHAPE.parameters

    params = trainings(figures(), {"train": train})[-1].params
    adapter = 4 * adapter_parameters(SHAPE, params)

    def disk(files: list[int], *optional: str, phases: Sequence[str] = ("train",)) -> dict[str, int]:
        needs = stages(SHAPE, dict.fromkeys(phases, params), wide, files, optional, True)
        return {name: need.disk for name, need in needs.items()}

    one, two = disk([10]), disk([10, 7], "reference", "generate")
    assert two["generate"] == two["reference"] + 10
    after = disk([10], phases=["pretrain", "train"])
    assert [after[name] - one["train"] for name in ("pretrain", "train")] == [0, adapter]
    assert (after["quantize"], "generate" in one, "reference" in one) == (one["quantize"] + adapter, False, False)
    assert two["reference"] == two["quantize"] == one["quantize"] + 7
    assert (two["quantize"], two["baseline"]) == (one["quantize"] + 7, one["baseline"])


@pytest.mark.parametrize("config", [{"hidden_size": 8}, {"num_local_experts": 8, **dict.fromkeys(["hidden_size"], 1)}])
def test_a_shape_that_is_not_known_is_named(config: dict[str, int]):
    with pytest.raises(Fail, match=r"^x (has|has no) .*: only dense decoders"):
        Shape.of_config(config, "x")
