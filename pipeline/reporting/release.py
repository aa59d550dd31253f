"""What is released beside the GGUF: model card, RUN.md, files for Ollama and LM Studio, licences.

Every figure comes from the metrics and every other fact from the artifacts; the words are in `templates`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.core.question import Message
from pipeline.core.source import Source
from pipeline.models.chat import ChatTemplate
from pipeline.models.gguf_header import LICENCE, LLAMA_3_LICENCE, SYSTEM_PROMPT, Header
from pipeline.models.manifest import Manifest
from pipeline.models.training import Training
from pipeline.reporting import comparison as words
from pipeline.reporting.comparison import Comparison, Decisions
from pipeline.reporting.pages import render
from pipeline.scoring.measures import rounded
from pipeline.scoring.protocols import user

TERMS = ["LICENSE*", "USE_POLICY*"]  # files of a base that go with what is derived from it
# Page -> its template. The Modelfile has a template of Llama 3's turns, because Ollama, given none, compares the GGUF's
# with those that it knows, and takes the nearest or none (template/template.go, `Named`).
PAGES = {
    "README.md": "release/card.md.j2",
    "RUN.md": "release/run.md.j2",
    "Modelfile": "release/modelfile.j2",
    "medical-reasoner.preset.json": "release/preset.json.j2",
}
SUMS = "SHA256SUMS"
SAMPLING = {"temperature": 0, "repeat_penalty": 1}  # greedy, as it was measured


class Splits(BaseModel):  # what the card quotes of metrics/format.json
    chat_date: str
    train: dict[str, float]
    validation: dict[str, float]
    test: dict[str, float]
    test_overlap: dict[str, int]


class Facts(NamedTuple):
    """Everything that a release says."""

    comparison: Comparison
    splits: Splits
    training: Training
    source: Source
    manifest: Manifest
    header: Header  # the GGUF's
    file: str  # the GGUF's name
    imatrix_questions: int  # 0: quantized without an importance matrix

    @property
    def metadata(self) -> dict[str, Any]:
        """The GGUF's metadata."""
        return self.header.metadata

    @property
    def name(self) -> str:
        """The model's name, which for a Llama 3 begins with it."""
        return self.metadata["general.name"]

    @property
    def is_llama_3(self) -> bool:
        """Whether the base is under the Meta Llama 3 Community License."""
        return self.metadata.get(LICENCE) == LLAMA_3_LICENCE

    @property
    def english(self) -> bool:
        """Whether the questions are known to be in English."""
        return self.source.simulated or bool(self.source.dataset)

    def licence(self, base: Path) -> dict[str, Any]:
        """The hub's keys for the licence; none where the base's or the data's are not known here.

        The directory `base` has the terms of the base, if there are any.
        """
        if self.is_llama_3:
            link = "LICENSE" if (base / "LICENSE").is_file() else self.metadata["general.license.link"]
            return {"license": "llama3", "license_name": "llama3", "license_link": link}
        if self.manifest.source == "hub":
            link = f"https://huggingface.co/{self.manifest.repo_id}"
            return {"license": "other", "license_name": "see-base-model", "license_link": link}
        return {"license": "mit"} if self.manifest.source == "tiny" and self.source.licence else {}


def public_name(header: Header) -> str:
    """A GGUF's name where it is published, such as Llama-3-medical-reasoner-8B-Q4_K_M.gguf."""
    name, size = header.metadata["general.name"], header.metadata["general.size_label"]
    return "-".join([*(part for part in name.split("-") if part != size), size, header.file_type]) + ".gguf"


def has_llama_3_turns(chat_template: str) -> bool:
    """Whether a Jinja chat template writes its turns as Llama 3's does."""
    turns: list[Message] = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    texts = [f"{turn['role']}<|end_header_id|>\n\n{turn['content']}<|eot_id|>" for turn in turns]
    template = ChatTemplate(chat_template, {"bos_token": ""}, "the GGUF's chat template")
    found = template.text(template.folded(turns), add_generation_prompt=True)
    return found == "<|start_header_id|>".join(["", *texts, "assistant<|end_header_id|>\n\n"])


def front_matter(facts: Facts, base: Path) -> str:
    """The card's metadata as YAML (https://github.com/huggingface/hub-docs, modelcard.md), results included."""
    from huggingface_hub import EvalResult, ModelCardData

    tuned, source = facts.comparison.tuned, facts.source
    measured: dict[str, Decisions | None] = {"chat": tuned, "question_only": tuned.protocols.get("question_only")}
    results = [
        EvalResult(
            task_type="question-answering",
            dataset_type=source.dataset or "other",
            dataset_name=source.name,
            dataset_config=protocol,  # results that differ in nothing but their names would become one
            dataset_split="test",
            metric_type=metric,
            metric_value=rounded(value),
        )
        for protocol, scores in measured.items()
        if scores
        for metric, value in (("accuracy", scores.accuracy.value), ("f1", scores.macro_f1))
    ]
    return ModelCardData(
        language="en" if facts.english else None,
        **facts.licence(base),
        library_name="gguf",
        base_model=facts.manifest.repo_id or None,
        base_model_relation="finetune" if facts.manifest.repo_id else None,
        quantized_by="medical-reasoner",
        datasets=[source.dataset] if source.dataset else None,
        metrics=["accuracy", "f1"],
        pipeline_tag="text-generation",
        tags=["gguf", "medical", *(["simulated-data"] if source.simulated else [])],
        model_name=facts.name,
        eval_results=results,
    ).to_yaml()


def write_release(directory: Path, facts: Facts, base: Path) -> None:
    """Write everything but the pictures into `directory`; the terms in the directory `base` are copied."""
    values: dict[str, Any] = {
        "facts": facts,
        "comparison": facts.comparison,
        "words": words,
        "system_prompt": facts.metadata[SYSTEM_PROMPT],
        "quant_type": facts.header.file_type,
        "llama_3_turns": has_llama_3_turns(facts.metadata["tokenizer.chat_template"]),
        "question": user("YOUR QUESTION", "THE ABSTRACT"),
        "front_matter": front_matter(facts, base),
        "sampling": SAMPLING,
        "public_name": public_name(facts.header),
    }
    pages = PAGES | ({"NOTICE": "release/notice.j2"} if facts.is_llama_3 else {})
    # `ollama run hf.co/...` reads template, system and params (https://huggingface.co/docs/hub/ollama).
    pages |= {"template": "release/template.j2"} if values["llama_3_turns"] else {}
    (directory / "system").write_text(values["system_prompt"], encoding="utf-8")
    (directory / "params").write_text(f"{json.dumps(SAMPLING)}\n", encoding="utf-8")
    sums = [f"{file.sha256}  ../{file.path}\n" for file in words.listed(facts.comparison).values()]
    (directory / SUMS).write_text("".join(sums), encoding="utf-8")
    for name, template in pages.items():
        (directory / name).write_text(render(template, **values), encoding="utf-8")
    for path in (path for pattern in TERMS for path in base.glob(pattern)):
        (directory / path.name).write_bytes(path.read_bytes())
