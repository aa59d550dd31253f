"""Tables of predictions, and the other inputs of `report`, made up for tests."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pipeline.core.facts import Conclusion, QuestionFacts
from pipeline.core.labels import LABELS, Label
from pipeline.core.params import read_section
from pipeline.core.rows import write_rows
from pipeline.models import imatrix
from pipeline.models.gguf_header import SYSTEM_PROMPT
from pipeline.models.quantized import write_sums
from pipeline.reporting.comparison import File, Quality, Subject
from pipeline.scoring.answers import Answer
from pipeline.scoring.base_protocol import Choice
from pipeline.scoring.measures import wilson
from pipeline.scoring.predictions import Prediction, write_predictions
from pipeline.sections.evaluate import ProtocolName
from pipeline.sections.report import Report
from pipeline.stages import report

ROOT = Path(__file__).parents[1]
CHAT_TEMPLATE = (ROOT / "pipeline/simulated/tiny_base/chat_template.jinja").read_text(encoding="utf-8")
GOLD: list[Label] = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55  # PubMedQA's 500 test questions
REPORT = Report(bootstrap_samples=1000, seed=0, confidence=0.95, bins=10)
MAJORITY, TFIDF = (
    Quality(accuracy=wilson(right, 500, 0.95), macro_f1=f1) for right, f1 in ((276, 0.237), (284, 0.358))
)
SUBJECT = Subject(
    data="made-up trials",
    simulated=True,
    rehearsal=False,
    gguf=File(bytes=1_000_000, sha256="0" * 64),
    base_protocol=Choice(chosen="chat", questions=50, accuracy={"chat": wilson(27, 50, 0.95)}),
    tfidf=TFIDF,
    majority=MAJORITY,
)
WEIGHTS = {"name": "model.safetensors", "size": 1, "sha256": "0" * 64}
SOURCE = {
    "simulated": True,
    "name": "made-up trials",
    "licence": "MIT",
    "dataset": "",
    "records": "ori_pqal.json",
    "test_ground_truth": "test_ground_truth.json",
}
DATA = {
    "chat_date": "2024-07-26",
    "train": {"questions": 450, "yes": 248, "no": 152, "maybe": 50},
    "validation": {"questions": 50, "yes": 28, "no": 17, "maybe": 5},
    "test": {"questions": 500, "yes": 276, "no": 169, "maybe": 55, "tokens_max": 777},
    "test_overlap": {"8_grams": 57, "13_grams": 3},
}
ANSWERS, CONCLUSIONS = "answers.jsonl", "conclusions.jsonl"
CHOICE = Choice(
    chosen="lm_eval", questions=50, accuracy={"chat": wilson(25, 50, 0.95), "lm_eval": wilson(30, 50, 0.95)}
)
INPUTS = (
    *("metrics", "source.json", "facts.jsonl", "base", "adapter/training.json"),
    *("medical-reasoner.gguf", "quantized", "imatrix.gguf", ANSWERS, CONCLUSIONS),
)
OUTPUTS = ("metrics/compare.json", "metrics/curves", "metrics/pictures", "release")


def answered(pmid: str, gold: Label, answer: Label, protocol: ProtocolName = "chat") -> Prediction:
    """A prediction of `answer` with 0.61 of the probability; the other labels have 0.14 each."""
    yes, no, maybe = (-0.5 if answer == label else -2.0 for label in LABELS)
    greedy = answer if protocol == "chat" else ""
    return Prediction(protocol, pmid, gold, (yes, no, maybe), answer, greedy, LABELS.index(answer))


def model(
    accuracy: float, seed: int, gold: Sequence[Label] = GOLD, protocol: ProtocolName = "chat"
) -> list[Prediction]:
    """A model's predictions, about `accuracy` of them right."""
    rng = random.Random(seed)
    return [
        answered(
            str(1000 + number),
            label,
            label if rng.random() < accuracy else rng.choice([other for other in LABELS if other != label]),
            protocol,
        )
        for number, label in enumerate(gold)
    ]


def facts(rows: Sequence[Prediction]) -> list[QuestionFacts]:
    """Facts about the questions of the rows; every tenth has no year."""
    return [
        QuestionFacts(
            pmid=row.pmid,
            year=1995 + number % 25 if number % 10 else None,
            abstract_words=120 + number % 160,
            numeric_results=number % 5 > 0,
        )
        for number, row in enumerate(rows)
    ]


def write_gguf(path: Path, **changes: Any) -> None:
    """Write a GGUF with an embedding alone whose metadata, but for the `changes`, are those of a Llama-3-8B."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(changes.get("name", "medical-reasoner"))
    if "licence" in changes:
        writer.add_license_name(changes["licence"])
        writer.add_license_link("https://llama.meta.com/llama3/license")
    writer.add_size_label("8B")
    writer.add_file_type(changes.get("file_type", gguf.LlamaFileType.MOSTLY_Q4_K_M))
    writer.add_context_length(8192)
    writer.add_embedding_length(4096)
    writer.add_block_count(32)
    writer.add_feed_forward_length(14336)
    writer.add_head_count(32)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float16))
    writer.add_head_count_kv(8)
    writer.add_chat_template(changes.get("chat_template", CHAT_TEMPLATE))
    writer.add_string(SYSTEM_PROMPT, changes.get("system_prompt", "Be brief."))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_values(directory: Path, **values: Any) -> None:
    """Write JSON files; a name's double underscores are slashes."""
    for name, value in values.items():
        path = directory / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")


def write_inputs(directory: Path) -> None:
    """Write params.yaml and every input of `report`; `directory` must be the working directory."""
    (directory / "params.yaml").write_text((ROOT / "profiles/micro.yaml").read_text(encoding="utf-8"))
    shutil.copytree(ROOT / ".dvc/plots", directory / ".dvc/plots", ignore=shutil.ignore_patterns("*.html"))
    tables = directory / "metrics/predictions"
    write_predictions(
        tables / "base.csv",
        [*model(0.5, 1), *model(0.6, 3, protocol="lm_eval"), *model(0.4, 4, protocol="question_only")],
    )
    write_predictions(
        tables / "tuned.csv",
        [*model(0.75, 2), *model(0.7, 5, protocol="lm_eval"), *model(0.55, 6, protocol="question_only")],
    )
    write_predictions(tables / "merged.csv", model(0.76, 2))
    write_rows(directory / "facts.jsonl", facts(model(0.76, 2)))
    (directory / "metrics/train_log.csv").write_text(
        "step,loss,validation_loss,learning_rate,grad_norm\n1,2.5,,0.1,1.0\n2,1.5,1.75,0.1,1.0\n"
    )
    training = {
        "params": read_section("train"),
        "modules": ["q_proj", "v_proj"],
        "training_examples": 450,
        "validation_examples": 50,
        "packages": {"torch": "2.13.0"},
    }
    write_values(
        directory,
        metrics__baseline={
            "base_protocol": CHOICE.model_dump(),
            "tfidf": TFIDF.model_dump(),
            "majority": MAJORITY.model_dump(),
        },
        metrics__format=DATA,
        source=SOURCE,
        base__manifest={"source": "tiny", "files": [WEIGHTS]},
        adapter__training=training,
    )
    write_gguf(directory / "medical-reasoner.gguf")
    (directory / "quantized").mkdir()
    other = directory / "quantized/medical-reasoner-IQ3_XS.gguf"
    write_gguf(other, file_type=gguf.LlamaFileType.MOSTLY_IQ3_XS)
    write_sums(directory / "quantized", [other])
    write_predictions(tables / "files/IQ3_XS.csv", model(0.7, 8))
    matrix = {"blk.0.attn_q.weight": imatrix.Entry(np.ones(4), 7)}
    imatrix.write(directory / "imatrix.gguf", matrix, 9)
    pmids = [row.pmid for row in model(0.5, 1)]
    write_rows(directory / CONCLUSIONS, (Conclusion(pmid=pmid, long_answer="Pain fell with it.") for pmid in pmids))
    written = {"tuned": ("Yes. Pain fell with it.", True), "base": ("Pain fell, and", False)}
    write_rows(
        directory / ANSWERS,
        (
            Answer(model=name, pmid=pmid, text=text, tokens=6, ended=ended)
            for name, (text, ended) in written.items()
            for pmid in pmids
        ),
    )


def make_report(directory: Path) -> dict[str, Any]:
    """Run the stage in the working directory `directory`; the figures that it writes."""
    report.main(*(directory / name for name in INPUTS), directory / "release")
    return json.loads((directory / "metrics/compare.json").read_text())
