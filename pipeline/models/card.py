"""Room on the card for a GGUF, before llama.cpp loads it: short of memory, it says nothing or ends the process."""

import ctypes
from pathlib import Path

from pipeline.core.errors import Fail
from pipeline.models.gguf_header import Header, read_header
from pipeline.models.memory import MIB, Load, Shape, compute_size, gguf_vram, layers_that_fit

GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU of ggml-backend.h: a card with memory of its own


def free_memory() -> int | None:
    """Free bytes of the cards that llama.cpp uses, beside its context there; None if it uses no card."""
    from llama_cpp._ggml import libggml

    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    free, total, found = ctypes.c_size_t(), ctypes.c_size_t(), list[int]()
    for index in range(libggml.ggml_backend_dev_count()):
        device = ctypes.c_void_p(libggml.ggml_backend_dev_get(ctypes.c_size_t(index)))
        if libggml.ggml_backend_dev_type(device) == GPU:
            libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append(free.value)
    return sum(found) if found else None


def fitting(gguf: Path, load: Load, free: int) -> str | None:
    """The largest file beside `gguf`, or in a directory there, that fits `free` bytes, and what it takes."""
    found: list[tuple[int, str]] = []
    for path in {*gguf.parent.glob("*.gguf"), *gguf.parent.glob("*/*.gguf")} - {gguf}:
        try:
            header = read_header(path)
            needed = gguf_vram(header.tensors, Shape.of_gguf(header), load)
        except (KeyError, Fail):  # such as an importance matrix
            continue
        if needed <= free:
            found.append((path.stat().st_size, f"--gguf {path}, which takes about {needed / MIB:,.0f} MiB"))
    return max(found)[1] if found else None


def check_room(gguf: Path, header: Header, load: Load, layers: int) -> str:
    """What to do if `gguf` with so many layers finds no memory; raises `Fail` if it certainly finds none on the card.

    Its weights and its cache alone are compared with what is free, because the rest is an estimate.
    """
    remedy, free = "close other programs, or set N_GPU_LAYERS=0 to use main memory", free_memory()
    if free is None or not layers:
        return remedy
    try:
        shape = Shape.of_gguf(header)
    except KeyError:  # the arithmetic holds for dense models only
        return remedy
    needed = gguf_vram(header.tensors, shape, load, layers)
    if needed <= free:
        return remedy
    fit = layers_that_fit(header.tensors, shape, load, free)
    remedy = f"set N_GPU_LAYERS={fit}, which leaves the other layers in main memory, or close other programs"
    if smaller := fitting(gguf, load, free):
        remedy = f"use the smaller file, {smaller}; or {remedy}"
    if needed - compute_size(shape, load) > free:
        raise Fail(
            f"{gguf} takes about {needed / MIB:,.0f} MiB on the card, and {free / MIB:,.0f} MiB are free; {remedy}"
        )
    return remedy
