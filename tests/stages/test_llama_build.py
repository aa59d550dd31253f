"""llama.cpp as it was compiled here: K-quants decode on this CPU, and converter and runtime are one version."""

import subprocess
import sys
from pathlib import Path

# Compiled by gcc 12 without the remedy in setup/llama.cmake, this dies of SIGSEGV on a CPU with AMX (20 tokens and
# more, quantized weights only). Rows of 256: a K-quant silently becomes another type at other widths.
CHILD = """
import sys
import gguf, llama_cpp, numpy as np

wide, small = sys.argv[1:]
width, inner, layers, vocabulary, tokens = 256, 512, 2, 512, 300

writer = gguf.GGUFWriter(wide, "llama")
writer.add_context_length(tokens)
writer.add_embedding_length(width)
writer.add_feed_forward_length(inner)
writer.add_block_count(layers)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(vocabulary)
writer.add_tokenizer_model("no_vocab")
random = np.random.default_rng(0)
def add(name, *shape):
    norm = len(shape) == 1
    writer.add_tensor(name, np.ones(shape, "f4") if norm else random.normal(0, 0.05, shape).astype("f4"))
add("token_embd.weight", vocabulary, width)
add("output_norm.weight", width)
add("output.weight", vocabulary, width)
for layer in range(layers):
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.{layer}.{name}.weight", width, width)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.{layer}.{name}.weight", width)
    for name in ("ffn_gate", "ffn_up"):
        add(f"blk.{layer}.{name}.weight", inner, width)
    add(f"blk.{layer}.ffn_down.weight", width, inner)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
assert llama_cpp.llama_model_quantize(wide.encode(), small.encode(), params) == 0

def logits(path):
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = tokens
    context = llama_cpp.llama_init_from_model(model, params)
    ids = (llama_cpp.llama_token * tokens)(*random_ids)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, tokens)) == 0
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,)).copy()

random_ids = random.integers(0, vocabulary, tokens).tolist()
types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(small).tensors}
print(sorted(types), np.corrcoef(logits(wide), logits(small))[0, 1])
"""


def test_a_quantized_file_decodes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "f32.gguf"), str(tmp_path / "q4_k_m.gguf")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, f"status {child.returncode} (-11 is SIGSEGV)\n{child.stderr[-2000:]}"
    types, correlation = child.stdout.splitlines()[-1].rsplit(" ", 1)
    assert types == "['F32', 'Q4_K', 'Q6_K']"
    assert float(correlation) > 0.95
