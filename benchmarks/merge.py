"""The merge of a rehearsal's base with a random adapter: its time against copying the same files, and its memory.

    python -m benchmarks.merge --project rehearsal --work /tmp

Both write to the same disk, and both times end when it has everything (sync). The project's `base` stage and the
download of the weights must be done; 17 GB are needed in --work.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.watch import Watch
from pipeline.core.records import read_json, write_json
from pipeline.models.weights import IDENTITY, MANIFEST, locate

R, ALPHA = 16, 16
KINDS = {
    "self_attn.q_proj": ("hidden", "hidden"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("hidden", "hidden"),
    "mlp.gate_proj": ("hidden", "inner"),
    "mlp.up_proj": ("hidden", "inner"),
    "mlp.down_proj": ("inner", "hidden"),
}


def random_adapter(directory: Path, base: Path) -> None:
    """LoRA matrices for all seven projections of every layer, as PEFT saves them."""
    import torch
    from safetensors.torch import save_file

    config = read_json(base / "config.json")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = {"hidden": config["hidden_size"], "inner": config["intermediate_size"]}
    sizes["kv"] = sizes["hidden"] // heads * kv_heads
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for kind, (inputs, outputs) in KINDS.items():
            name = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(R, sizes[inputs]) * 0.01
            tensors[f"{name}.lora_B.weight"] = torch.randn(sizes[outputs], R) * 0.01
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    write_json(directory / "adapter_config.json", {"r": R, "lora_alpha": ALPHA})
    write_json(directory / IDENTITY, {"files": read_json(base / MANIFEST)["files"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    base = options.project.absolute() / "models" / "base"
    manifest = read_json(base / MANIFEST)
    weights = [locate(base, manifest) / file["name"] for file in manifest["files"]]
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        work = Path(temporary)
        random_adapter(work / "adapter", base)
        os.sync()
        start = time.perf_counter()
        (work / "copy").mkdir()
        for path in weights:
            shutil.copyfile(path, work / "copy" / path.name)
        os.sync()
        copied = time.perf_counter() - start
        shutil.rmtree(work / "copy")
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "pipeline.stages.merge",
            base,
            work / "adapter",
            work / "merged",
            work / "r.json",
        ]
        process = subprocess.Popen([str(part) for part in command])
        watch = Watch(process.pid, [])
        status = process.wait()
        os.sync()
        merged = time.perf_counter() - start
        watch.stop()
    if status:
        sys.exit("merge: the stage failed; its last lines are above")
    figures = {"copy_s": copied, "merge_s": merged, "time_over_copy": merged / copied}
    figures["peak_anon_gib"] = max(watch.peak_anon.values()) / 2**30
    print("merge:", json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
