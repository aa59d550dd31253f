"""Rehearse a hub profile with random weights: its VRAM, memory, disk and time, before the real download.

    python -m benchmarks.rehearsal --profile profiles/llama3-8b-t4.yaml --tokenizer DIR [--pubmedqa DIR]

A local server speaks the hub's protocol and serves random weights of Llama-3-8B's exact shape with the tokenizer and
chat template in DIR; `dvc repro` then runs the profile in ./rehearsal with other ids, commits, hashes and addresses.
Run it again after an interruption and it continues. The report stage releases nothing from random weights.
"""

import argparse
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from ruamel.yaml import YAML

from benchmarks.machine import LOGS, ROOT, Watch, environment
from benchmarks.record import Figures, record

REPOSITORY = "rehearsal/Llama-3-8B-random-weights"  # report releases nothing whose base begins with 'rehearsal/'
COMMIT = hashlib.sha1(REPOSITORY.encode()).hexdigest()
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_SHARD = 5_000_000_000  # bytes, as in the original repository: four files
POOL = 8_388_593  # a prime, so that no two rows of a matrix begin at the same place in the pool

# config.json of meta-llama/Meta-Llama-3-8B-Instruct, but for the version of transformers in it.
CONFIG: dict[str, Any] = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": 128009, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
  "vocab_size": 128256
}""")
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
GENERATION = {"bos_token_id": 128000, "do_sample": False, "eos_token_id": [128001, 128009]}


def shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """The tensors of a Llama of that configuration, in the order of the original files."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": [hidden], "mlp.down_proj": [hidden, inner], "mlp.gate_proj": [inner, hidden]}
        layer |= {"mlp.up_proj": [inner, hidden], "post_attention_layernorm": [hidden]}
        layer |= {
            f"self_attn.{name}_proj": [size, hidden]
            for name, size in {"k": kv, "o": hidden, "q": hidden, "v": kv}.items()
        }
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return tensors | {"model.norm.weight": [hidden], "lm_head.weight": [config["vocab_size"], hidden]}


class Shard:
    """A safetensors file of random bfloat16 weights that is never stored: its bytes are computed as they are read."""

    def __init__(self, tensors: dict[str, list[int]], pool: memoryview, ones: memoryview) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.parts: list[tuple[int, int, memoryview, int]] = []  # start, end, where from, offset there
        offset = 0
        for name, shape in tensors.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            seed = 2 * (int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) % POOL)
            self.parts.append((offset, offset + size, *((ones, 0) if "norm" in name else (pool, seed))))
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.head = struct.pack("<Q", len(text)) + text
        self.size = len(self.head) + offset

    def read(self, start: int = 0) -> Iterator[memoryview]:
        """The file's bytes from `start` on, in pieces of a few megabytes."""
        if start < len(self.head):
            yield memoryview(self.head)[start:]
        position = max(0, start - len(self.head))
        for first, last, source, offset in self.parts:
            while first <= position < last:
                at = (offset + position - first) % len(source)
                piece = source[at : at + min(last - position, len(source) - at)]
                yield piece
                position += len(piece)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.read():
            digest.update(piece)
        return digest.hexdigest()


class Text:
    """A small file in memory."""

    def __init__(self, body: bytes) -> None:
        self.body, self.size = body, len(body)

    def read(self, start: int = 0) -> Iterator[memoryview]:
        yield memoryview(self.body)[start:]

    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


def repository(config: dict[str, Any], tokenizer: Path, max_shard: int = MAX_SHARD) -> dict[str, Text | Shard]:
    """The files of a model repository: configuration, tokenizer, index and shards."""
    normal = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * config["initializer_range"]
    pool = memoryview((normal.view(np.uint32) >> 16).astype(np.uint16)).cast("B")  # bfloat16 is float32's upper half
    ones = memoryview(np.full(config["hidden_size"], 0x3F80, dtype=np.uint16)).cast("B")
    groups: list[dict[str, list[int]]] = [{}]
    size = 0
    for name, shape in shapes(config).items():
        tensor = 2 * int(np.prod(shape))
        if groups[-1] and size + tensor > max_shard:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += tensor
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    shards = {name: Shard(group, pool, ones) for name, group in zip(names, groups, strict=True)}
    index = {
        "metadata": {"total_size": sum(2 * int(np.prod(shape)) for shape in shapes(config).values())},
        "weight_map": {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group},
    }
    texts = {"config.json": config, "generation_config.json": GENERATION, "model.safetensors.index.json": index}
    files: dict[str, Text | Shard] = {name: Text(json.dumps(value).encode()) for name, value in texts.items()}
    files |= {name: Text((tokenizer / name).read_bytes()) for name in TOKENIZER}
    return files | shards


def serve(
    repo_id: str, commit: str, files: dict[str, Text | Shard], others: Path | None, port: int
) -> ThreadingHTTPServer:
    """Serve `files` as a repository at a commit as the hub does, and the files of the directory `others` under /files.

    Safetensors files are LFS files.
    """
    with ThreadPoolExecutor() as threads:
        digests = dict(zip(files, threads.map(lambda file: file.sha256(), files.values()), strict=True))
    siblings: list[dict[str, Any]] = []
    for name, file in files.items():
        lfs = {"lfs": {"sha256": digests[name], "oid": digests[name], "size": file.size, "pointerSize": 134}}
        large = lfs if name.endswith(".safetensors") else {}
        blob = (
            digests[name].encode() if large or isinstance(file, Shard) else file.body
        )  # of a large one git has a pointer
        git = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        siblings.append({"rfilename": name, "size": file.size, "blobId": git, **large})
    info = {"id": repo_id, "sha": commit, "private": False, "gated": False, "tags": []}
    tree = [{"type": "file", "path": s["rfilename"], "oid": s["blobId"], **s} for s in siblings]
    answers: dict[str, Text | Shard] = {
        f"/api/models/{repo_id}/revision/{commit}": Text(json.dumps(info | {"siblings": siblings}).encode()),
        f"/api/models/{repo_id}/tree/{commit}": Text(json.dumps(tree).encode()),
        **{f"/{repo_id}/resolve/{commit}/{name}": file for name, file in files.items()},
    }
    if others:
        answers |= {f"/files/{path.name}": Text(path.read_bytes()) for path in others.iterdir() if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path not in answers:
                self.send_error(404)
                return
            file = answers[path]
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, end = (int(wanted[1]), int(wanted[2] or file.size)) if wanted else (0, file.size)
            length = min(end + 1, file.size) - start
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{file.size}")
            self.send_header("Content-Length", str(length))
            self.send_header("Content-Type", "application/json" if "/api/" in path else "application/octet-stream")
            if (name := path.rsplit("/", 1)[-1]) in digests:
                self.send_header("ETag", f'"{digests[name]}"')
                self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                for piece in file.read(start):
                    self.wfile.write(piece[:length])
                    length -= min(length, len(piece))
                    if not length:
                        break

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server


def prepare(directory: Path, profile: Path, base: dict[str, str], url: str) -> None:
    """Copy the project into `directory`, with the profile as its params.yaml; outputs of an earlier run stay.

    `base` changes the section base; `url` is the server that has the question files, if it is not the profile's.
    """
    shutil.copytree(ROOT / "pipeline", directory / "pipeline", dirs_exist_ok=True)
    shutil.copytree(ROOT / ".dvc" / "plots", directory / ".dvc" / "plots", dirs_exist_ok=True)
    for name in ("dvc.yaml", "pyproject.toml", "constraints.txt", "constraints-gpu.txt", ".dvcignore", ".dvc/config"):
        shutil.copyfile(ROOT / name, directory / name)
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.no_scm", "true"], cwd=directory, check=True)
    yaml = YAML()
    params: Any = yaml.load(profile)
    params["base"] |= base
    if url:
        params["download"]["location"] = f"{url}/files"
    yaml.dump(params, directory / "params.yaml")


def repro(directory: Path, url: str, targets: list[str]) -> tuple[int, dict[str, dict[str, float]]]:
    """Run `dvc repro`; its exit status, and seconds, peak of anonymous memory and peak of disk by stage."""
    given = environment(HF_ENDPOINT=url, HF_HOME=str(directory / "hub"), PYTHONUNBUFFERED="1")
    command = [sys.executable, "-m", "dvc", "repro", *targets]
    began: dict[str, float] = {}
    with subprocess.Popen(command, cwd=directory, env=given, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        watch = Watch(process.pid, directory)
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if found := re.match(r"Running stage '(\w+)'", line):
                watch.phase = found[1]
                began[found[1]] = time.monotonic()
        watch.stop()
    ends = [*began.values(), time.monotonic()][1:]
    measured = {
        stage: {
            "wall_s": round(end - at, 1),
            "peak_anon_gib": round(watch.peak_anon.get(stage, 0) / 2**30, 2),
            "disk_gb": round(watch.peak_disk.get(stage, 0) / 1e9, 2),
        }
        for (stage, at), end in zip(began.items(), ends, strict=True)
    }
    return process.returncode, measured


def figures_of(directory: Path, measured: dict[str, dict[str, float]]) -> Figures:
    """Time, memory and disk of every stage and of all; VRAM and speed as the stages measured them."""
    units = {"wall_s": "s", "peak_anon_gib": "GiB", "disk_gb": "GB"}
    figures: Figures = {
        "rehearsal.wall_s": (round(sum(costs["wall_s"] for costs in measured.values()), 1), "s"),
        "rehearsal.disk_gb": (max(costs["disk_gb"] for costs in measured.values()), "GB"),
        "rehearsal.gguf_gb": (round((directory / "models" / "medical-reasoner.gguf").stat().st_size / 1e9, 2), "GB"),
    }
    for stage, costs in measured.items():
        figures |= {f"rehearsal.{stage}.{name}": (value, units[name]) for name, value in costs.items()}
        resources = directory / "metrics" / f"{stage}_resources.json"
        own = json.loads(resources.read_text(encoding="utf-8")) if resources.is_file() else {}
        if "peak_vram_reserved_mib" in own:
            figures[f"rehearsal.{stage}.vram_gib"] = (round(own["peak_vram_reserved_mib"] / 1024, 2), "GiB")
        if own.get("tokens_per_second"):
            figures[f"rehearsal.{stage}.tokens_per_s"] = (own["tokens_per_second"], "tokens/s")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, default=ROOT / "profiles" / "llama3-8b-t4.yaml")
    parser.add_argument("--tokenizer", type=Path, help=f"a directory with Llama 3's {', '.join(TOKENIZER)}")
    parser.add_argument("--pubmedqa", type=Path, help="a directory with PubMedQA's two files; left out: the network")
    parser.add_argument("--directory", type=Path, default=Path("rehearsal"), help="where it runs: 60 GB of disk")
    parser.add_argument("--shape", choices=["llama3-8b", "tiny"], default="llama3-8b", help="tiny: to try the command")
    parser.add_argument("--port", type=int, default=8377, help="the same one when an earlier run continues")
    parser.add_argument("targets", nargs="*", help="stages; left out: all, and the figures are recorded")
    options = parser.parse_args()
    if not options.profile.is_file():
        sys.exit(f"rehearsal: {options.profile} is missing; `ls profiles` shows what there is")
    if not options.tokenizer or not all((options.tokenizer / name).is_file() for name in TOKENIZER):
        sys.exit(f"rehearsal: --tokenizer must name a directory with {', '.join(TOKENIZER)} of Llama 3")
    directory = options.directory.absolute()
    config = CONFIG | (TINY if options.shape == "tiny" else {})
    print(f"rehearsal: hashing {options.shape}'s random weights", flush=True)
    with serve(REPOSITORY, COMMIT, repository(config, options.tokenizer), options.pubmedqa, options.port) as server:
        url = f"http://127.0.0.1:{options.port}"
        prepare(
            directory, options.profile, {"repo_id": REPOSITORY, "revision": COMMIT}, url if options.pubmedqa else ""
        )
        status, measured = repro(directory, url, options.targets)
        server.shutdown()
    columns = ("wall_s", "peak_anon_gib", "disk_gb")
    lines = [f"{'stage':10}" + "".join(f"{name:>14}" for name in columns)]
    lines += [f"{stage:10}" + "".join(f"{costs[name]:14.2f}" for name in columns) for stage, costs in measured.items()]
    print("\n".join(lines), flush=True)
    if status:
        sys.exit("rehearsal: a stage failed; its last lines are above")
    if options.shape == "llama3-8b" and not options.targets and len(measured) > 1:
        command = f"python -m benchmarks.rehearsal --profile profiles/{options.profile.name} --tokenizer DIR"
        record(figures_of(directory, measured), command, LOGS / "rehearsal.log", text="\n".join(lines))


if __name__ == "__main__":
    main()
