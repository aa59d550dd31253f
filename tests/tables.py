"""Tables of predictions, and the other inputs of `report`, made up for tests."""

import json
import random
from pathlib import Path
from typing import Any

import gguf

from pipeline.models.gguf_header import SYSTEM_PROMPT
from pipeline.scoring.measures import COLUMNS, Prediction
from pipeline.scoring.protocols import LABELS
from pipeline.simulated.tokenizer import CHAT_TEMPLATE
from pipeline.stages import report

GOLD = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55  # PubMedQA's 500 test questions


def model(accuracy: float, seed: int, gold: list[str] = GOLD) -> list[Prediction]:
    """A model's answers, about `accuracy` of them right."""
    rng = random.Random(seed)
    rows: list[Prediction] = []
    for number, label in enumerate(gold):
        answer = label if rng.random() < accuracy else rng.choice([other for other in LABELS if other != label])
        yes, no, maybe = (-0.5 if answer == other else -2.0 for other in LABELS)
        rows.append(Prediction(str(1000 + number), label, (yes, no, maybe), answer, answer, LABELS.index(answer)))
    return rows


def lines(protocol: str, rows: list[Prediction]) -> list[str]:
    """The rows as lines of a table."""
    return [
        ",".join([protocol, r.pmid, r.label, *map(str, r.log_probabilities), r.prediction, r.greedy, str(r.top_token)])
        for r in (rows if protocol == "chat" else [row._replace(greedy="") for row in rows])
    ]


def write_table(path: Path, **protocols: list[Prediction]) -> None:
    """Write a table of predictions as `evaluate` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = [line for protocol, rows in protocols.items() for line in lines(protocol, rows)]
    path.write_text("\n".join([",".join(COLUMNS), *body]) + "\n", encoding="utf-8")


INPUTS = (
    "base.csv tuned.csv merged.csv baseline.json train_log.csv format.json source.json base medical-reasoner.gguf"
).split()
OUTPUTS = ["compare.json", "reliability.csv", "risk_coverage.csv", "pictures", "release"]
PARAMS = """
report: {bootstrap_samples: 1000, seed: 0, confidence: 0.95, bins: 10}
train: {backend: trl, seed: 3407, r: 16, lora_alpha: 32, lora_dropout: 0.1, target_modules: [q_proj, v_proj],
    bnb_4bit_quant_type: nf4, dtype: float16, max_length: 1024, max_steps: 60, per_device_train_batch_size: 2,
    gradient_accumulation_steps: 4, learning_rate: 2e-4, lr_scheduler_type: linear, warmup_steps: 5, weight_decay: 0.01,
    optim: adamw_8bit}
"""
BASELINES = {"majority_accuracy": 0.552, "majority_macro_f1": 0.237, "tfidf_accuracy": 0.568, "tfidf_macro_f1": 0.358}
WEIGHTS = {"name": "model.safetensors", "size": 1, "sha256": "0" * 64}
DATA = {
    "train": {"questions": 450},
    "validation": {"questions": 50},
    "test": {"questions": 500, "tokens_max": 777},
    "test_overlap": {"8_grams": 57, "13_grams": 3},
}


def write_gguf(path: Path, **changes: Any) -> None:
    """Write a GGUF without tensors whose metadata, but for the `changes`, are those of a Llama-3-8B."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(changes.get("name", "medical-reasoner"))
    if "licence" in changes:
        writer.add_license_name(changes["licence"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(8192)
    writer.add_embedding_length(4096)
    writer.add_block_count(32)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_chat_template(changes.get("chat_template", CHAT_TEMPLATE))
    writer.add_string(SYSTEM_PROMPT, changes.get("system_prompt", "Be brief."))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def write_inputs(directory: Path) -> None:
    """Write params.yaml and every input of `report`."""
    (directory / "params.yaml").write_text(PARAMS)
    write_table(directory / "base.csv", chat=model(0.5, 1), lm_eval=model(0.6, 3), question_only=model(0.4, 4))
    write_table(directory / "tuned.csv", chat=model(0.75, 2), lm_eval=model(0.7, 5), question_only=model(0.55, 6))
    write_table(directory / "merged.csv", chat=model(0.76, 2))
    (directory / "train_log.csv").write_text("step,loss,learning_rate,grad_norm\n1,2.5,0.1,1.0\n2,1.5,0.1,1.0\n")
    (directory / "base").mkdir()
    for name, value in {
        "baseline.json": BASELINES,
        "format.json": DATA,
        "source.json": {"simulated": True, "name": "made-up trials", "licence": "MIT"},
        "base/manifest.json": {"source": "tiny", "files": [WEIGHTS]},
    }.items():
        (directory / name).write_text(json.dumps(value))
    write_gguf(directory / "medical-reasoner.gguf")


def make_report(directory: Path) -> dict[str, Any]:
    """Run the stage in the working directory `directory`; the figures that it writes."""
    report.main(*(directory / name for name in INPUTS + OUTPUTS))
    return json.loads((directory / "compare.json").read_text())
