"""What scoring a question costs over decoding its prompt and reading nothing: `python -m benchmarks.scoring`.

Run it in the project's root after `dvc repro`: it takes the tokenizer of models/base and the questions of
data/formatted/test.jsonl, and a Llama of 405 million random weights at Q4_K_M, so that kernels are the cost and not
Python. Each question is decoded bare and scored in every way in turn, over several rounds; a ratio is that of the sums
of each question's fastest times, since what else runs on a machine only ever adds.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import HERE, record
from pipeline.core.records import read_jsonl
from pipeline.models.gguf import build
from pipeline.scoring.protocols import LABELS
from pipeline.scoring.scorer import Choices, Scorer

QUESTIONS, ROUNDS = 8, 5
N_CTX = 2048
LONG = {"yes": "Yes, it is so", "no": "No, it is not", "maybe": "Maybe it is so"}


def random_model(base: Path, directory: Path) -> None:
    """A Llama with the tokenizer of `base` and 405 million random weights in bfloat16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(base)),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        torch_dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} million weights", flush=True)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, directory / name)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(gguf: Path, test: Path) -> dict[str, dict[str, float]]:
    """Seconds of the questions in all, and tokens of a label's longest form, for each way; 'bare' decodes alone."""
    rows = read_jsonl(test)[:QUESTIONS]
    with Scorer(gguf, N_CTX) as scorer:
        long: Choices = {label: [scorer.tokenize(LONG[label])] for label in LABELS}

        def bare(tokens: list[int]) -> None:
            scorer.lib.llama_memory_clear(scorer.lib.llama_get_memory(scorer.context), True)
            scorer.decode(tokens, [], 0)
            scorer.lib.llama_synchronize(scorer.context)

        fastest: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for number, row in enumerate(rows):
                chat, plain = scorer.chat(row["prompt"])[0], scorer.plain(row["lm_eval"])[0]
                ways = {
                    "bare_chat": lambda tokens=chat: bare(tokens),
                    "chat": lambda row=row: scorer.score(*scorer.chat(row["prompt"])),
                    "long_forms": lambda tokens=chat: scorer.score(tokens, long),
                    "bare_lm_eval": lambda tokens=plain: bare(tokens),
                    "lm_eval": lambda row=row: scorer.score(*scorer.plain(row["lm_eval"])),
                }
                for way, action in ways.items():
                    best = fastest.setdefault(way, [float("inf")] * len(rows))
                    best[number] = min(best[number], timed(action))
        tokens = {"chat": scorer.forms, "long_forms": long, "lm_eval": scorer.plain(rows[0]["lm_eval"])[1]}
    longest = {way: max(len(form) for forms in choices.values() for form in forms) for way, choices in tokens.items()}
    return {way: {"seconds": sum(best), "longest_form": longest.get(way, 0)} for way, best in fastest.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, "model")
        random_model(Path("models/base"), directory)
        build(directory, Path(temporary, "model.gguf"), "Q4_K_M", {})
        ways = measure(Path(temporary, "model.gguf"), Path("data/formatted/test.jsonl"))
    log = HERE / "logs" / "scoring.log"
    log.write_text(json.dumps(ways, indent=1) + "\n", encoding="utf-8")
    print(log.read_text(encoding="utf-8"))
    chat, lm_eval = ways["bare_chat"]["seconds"], ways["bare_lm_eval"]["seconds"]
    figures = {
        "evaluate.cpu.time_over_bare_prompt": (round(ways["chat"]["seconds"] / chat, 3), ""),
        "evaluate.cpu.lm_eval.time_over_bare_prompt": (round(ways["lm_eval"]["seconds"] / lm_eval, 3), ""),
        "evaluate.cpu.long_forms.time_over_bare_prompt": (round(ways["long_forms"]["seconds"] / chat, 3), ""),
        "evaluate.cpu.long_forms.tokens": (ways["long_forms"]["longest_form"], "tokens"),
        "evaluate.cpu.questions_per_s": (round(QUESTIONS / ways["chat"]["seconds"], 3), "questions/s of 405 M weights"),
    }
    record(figures, "python -m benchmarks.scoring", log)


if __name__ == "__main__":
    main()
