"""llama.cpp as it was compiled here decodes K-quants on this CPU."""

import subprocess
import sys
from pathlib import Path

from tests.stages.helpers import examples

# Compiled by gcc 12 without the remedy in setup/llama.cmake, this dies of SIGSEGV on a CPU with AMX: for 20 tokens and
# more, and for quantized weights only.
CHILD = """
import sys
import numpy as np
from pipeline.scoring.scorer import Scorer

def after(path):
    with Scorer(__import__("pathlib").Path(path), 512, "") as scorer:
        return scorer.score(list(map(int, sys.argv[3:])), {})[1]

print(np.corrcoef(after(sys.argv[1]), after(sys.argv[2]))[0, 1])
"""


def test_a_quantized_file_decodes_and_says_nearly_what_the_16_bit_file_says(
    micro: Path, shipped: Path, wide: Path
) -> None:
    tokens = examples(micro)[0].input_ids
    assert len(tokens) > 100
    command = [sys.executable, "-c", CHILD, shipped, wide, *map(str, tokens)]
    child = subprocess.run(command, cwd=micro, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, f"status {child.returncode} (-11 is SIGSEGV)\n{child.stderr[-2000:]}"
    assert float(child.stdout) > 0.95
