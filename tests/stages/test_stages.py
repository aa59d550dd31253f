"""What each stage leaves on the micro profile: all of its outputs and nothing else, and what they say."""

import json
import math
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.files import read_rows, sha256
from pipeline.core.labels import LABELS
from pipeline.models.gguf_header import SYSTEM_PROMPT, read_header
from pipeline.scoring.answers import Answer
from pipeline.scoring.predictions import UNPARSABLE
from pipeline.scoring.protocols import PROTOCOLS, chat
from pipeline.scoring.scorer import Scorer, parse_decision
from tests.conftest import ROOT, stages, yaml
from tests.stages.helpers import TINY_BASE, call, examples, numbers, questions, table, tensors

CONFIGURATION = {"chat_template.jinja", "config.json", "generation_config.json", "manifest.json"}
CONFIGURATION |= {"tokenizer.json", "tokenizer_config.json"}
FILES = {
    "data": {"answers.jsonl", "artificial.jsonl"},
    "data/raw": {"ori_pqal.json", "source.json", "test_ground_truth.json"},
    "data/formatted": {
        f"{name}.jsonl" for name in ("conclusions", "test", "test_facts", "train", "validation", "validation_questions")
    }
    | {"system_prompt.txt"},
    "models/base": CONFIGURATION,
    "models/adapter": {"adapter_config.json", "adapter_model.safetensors", "trained_on.json", "training.json"},
    "models/merged": CONFIGURATION | {"model.safetensors"},
    "models": {"imatrix.gguf", "medical-reasoner.gguf"},
    "models/quantized": {"medical-reasoner-IQ3_XS.gguf", "SHA256SUMS"},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEASURING = {"evaluate", "reference", "baseline", "generate", "report"}


CONCLUSIONS = "data/formatted/conclusions.jsonl"


def written(stage: dict[str, Any]) -> set[str]:
    """The paths that a stage of dvc.yaml writes."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return {path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)}


def test_every_stage_writes_all_that_dvc_yaml_names_and_nothing_else(micro: Path) -> None:
    for directory, names in FILES.items():
        assert {path.name for path in (micro / directory).iterdir() if path.is_file()} - {".gitignore"} == names
    declared = set[str]().union(*map(written, stages(micro).values()))
    assert [path for path in declared if not (micro / path).exists()] == []
    found = [path.relative_to(micro) for path in (micro / "metrics").rglob("*") if path.is_file()]
    assert [path for path in found if not declared & {str(path), *map(str, path.parents)}] == []
    assert list(micro.rglob("*.partial")) == []
    assert not (micro / ".checkpoints").exists()


def test_every_figure_is_finite_and_every_long_stage_says_what_it_cost(micro: Path) -> None:
    for path in (micro / "metrics").glob("*.json"):
        assert not re.search("NaN|Infinity", path.read_text()), path
    for stage in stages(micro).keys() - {"download", "format", "report"}:
        assert {"seconds", "peak_rss_mib"} <= numbers(micro / "metrics" / f"{stage}_resources.json").keys(), stage


# The data


def test_the_splits_are_disjoint_and_the_test_is_the_list_of_the_data(micro: Path) -> None:
    splits = {"train": examples(micro), "validation": examples(micro, "validation"), "test": questions(micro)}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 32, "validation": 8, "test": 20}
    truth = numbers(micro / "data" / "raw" / "test_ground_truth.json")
    assert {row.pmid: row.label for row in splits["test"]} == truth
    assert len({row.pmid for rows in splits.values() for row in rows}) == 60
    lengths = [row["tokens"] for row in table(micro / "metrics" / "token_lengths.csv") if row["split"] == "train"]
    assert lengths == [str(len(row.input_ids)) for row in splits["train"]]


def test_only_measuring_stages_read_test_questions_or_what_was_answered() -> None:
    graph = stages(ROOT)
    answers = {"data/formatted/test.jsonl", "data/formatted/test_facts.jsonl", CONCLUSIONS}.union(
        *(written(graph[stage]) for stage in MEASURING)
    )
    for stage in graph.keys() - MEASURING:
        for dep in graph[stage]["deps"]:  # nor a directory that one of them lies in
            assert [path for path in answers if Path(path).is_relative_to(dep)] == [], (stage, dep)
        assert "test.jsonl" not in graph[stage]["cmd"]
    # LONG_ANSWER of a test question reaches no stage that asks a model.
    assert [stage for stage in graph if CONCLUSIONS in graph[stage]["deps"]] == ["report"]


@pytest.mark.slow
def test_other_answers_to_the_test_questions_make_the_same_model(micro: Path, project: Path) -> None:
    raw = project / "data" / "raw"
    records, truth = numbers(raw / "ori_pqal.json"), numbers(raw / "test_ground_truth.json")
    other = {"yes": "no", "no": "maybe", "maybe": "yes"}
    for pmid, label in truth.items():
        truth[pmid] = other[label]
        records[pmid] |= {"final_decision": other[label], "LONG_ANSWER": "Nothing of the kind."}
    (raw / "ori_pqal.json").write_text(json.dumps(records))
    (raw / "test_ground_truth.json").write_text(json.dumps(truth))
    assert [call(project, stage) for stage in ("format", "train", "merge", "quantize")] == [""] * 4
    assert questions(project) != questions(micro)
    for name in ("data/formatted/train.jsonl", "models/medical-reasoner.gguf", "metrics/train.json"):
        assert (project / name).read_bytes() == (micro / name).read_bytes(), name


# The training


def test_what_is_trained_is_the_adapter_in_float32_on_a_base_in_nf4(trainer: Any) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    layers = trainer.model.config.num_hidden_layers
    assert sorted(name.split(".lora_")[0].split(".")[-1] for name in trained) == sorted(2 * layers * PROJECTIONS)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    quantized = [module for module in trainer.model.modules() if isinstance(module, Linear4bit)]
    assert [module.weight.quant_type for module in quantized] == ["nf4"] * len(PROJECTIONS) * layers


def test_the_loss_is_on_the_answer_and_its_end_of_turn_alone(micro: Path, trainer: Any) -> None:
    import torch

    rows = examples(micro)[:5]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    for ids, labels, row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), rows, strict=True):
        assert ids[: len(row.input_ids)] == row.input_ids
        answer = row.input_ids[row.prompt_tokens :]
        assert labels == [-100] * row.prompt_tokens + answer + [-100] * (len(ids) - len(row.input_ids))
        text = trainer.processing_class.decode(answer)
        assert text.lower().startswith(row.label)
        assert text.endswith("<|eot_id|>")
    with torch.no_grad():  # the number that is minimised is the mean over these tokens
        loss = trainer.compute_loss(trainer.model, batch)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_the_decisions_weight_multiplies_the_gradient_of_the_answers_first_token(trainer: Any) -> None:
    import torch

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    trained = [parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    gradients = torch.autograd.grad(loss, trained)
    labels = batch["labels"][:, 1:]
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    first = ((labels != -100).cumsum(1) == 1) & (labels != -100)
    expected = torch.autograd.grad((losses * torch.where(first, 4.0, 1.0)).sum() / (labels != -100).sum(), trained)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert float(torch.dist(gradient, wanted)) < 1e-3 * float(wanted.norm())
    assert loss.item() == pytest.approx((losses.sum() / (labels != -100).sum()).item(), rel=1e-4)  # without the weight


def test_the_adapter_says_what_it_was_trained_on_and_names_no_path_and_the_base_is_unchanged(micro: Path) -> None:
    adapter = micro / "models" / "adapter"
    config, training = numbers(adapter / "adapter_config.json"), numbers(adapter / "training.json")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (16, 16, "LORA")
    assert config["target_modules"] == training["modules"] == sorted(PROJECTIONS)
    assert training["params"] == yaml.load((micro / "params.yaml").read_text())["train"]
    assert (training["training_examples"], training["validation_examples"]) == (32, 8)
    assert [path for path in adapter.iterdir() if bytes(micro) in path.read_bytes()] == []
    assert all(matrix.abs().max() > 0 for matrix in tensors(adapter / "adapter_model.safetensors").values())  # B was 0
    files = numbers(micro / "models" / "base" / "manifest.json")["files"]
    identity = {"adapter": sha256(adapter / "adapter_model.safetensors"), "files": files}
    assert numbers(adapter / "trained_on.json") == identity
    assert [file["sha256"] for file in files] == [sha256(micro / TINY_BASE / "model.safetensors")]


def test_the_log_has_a_row_for_each_step(micro: Path) -> None:
    log, memory = (table(micro / "metrics" / f"train_{name}.csv") for name in ("log", "memory"))
    assert [row["step"] for row in log] == [row["step"] for row in memory] == ["1", "2", "3"]
    assert list(log[0]) == ["step", "loss", "validation_loss", "learning_rate", "grad_norm"]
    validated = [row.pop("validation_loss") for row in log]
    assert all(math.isfinite(float(value)) for row in log + memory for value in row.values())
    metrics = numbers(micro / "metrics" / "train.json")
    assert [metrics["first_loss"], metrics["last_loss"]] == [float(log[i]["loss"]) for i in (0, -1)]
    assert (validated[0], bool(validated[1]), float(validated[2])) == ("", True, metrics["validation_loss"])  # every 2


def test_a_loss_that_is_not_finite_ends_the_training_at_that_step(project: Path) -> None:
    from safetensors.torch import save_file

    base = shutil.copytree(project / TINY_BASE, project / "local")
    weights = tensors(base / "model.safetensors")
    weights["model.norm.weight"][0] = math.inf
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    file = {"name": "model.safetensors", "size": (base / "model.safetensors").stat().st_size}
    file["sha256"] = sha256(base / "model.safetensors")
    manifest = {"source": "local", "path": "local", "files": [file]}
    (project / "models" / "base" / "manifest.json").write_text(json.dumps(manifest))
    assert call(project, "train").startswith("train: the loss at step 1 is nan; lower train.learning_rate")


# The file that ships, and its predictions


def test_the_gguf_says_what_it_is_and_holds_template_and_system_prompt(micro: Path, shipped: Path) -> None:
    values = read_header(shipped).metadata
    config = numbers(micro / "models" / "base" / "config.json")
    expected = {
        "general.name": "medical-reasoner",
        "general.version": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "general.file_type": 15,  # Q4_K_M
        "general.sampling.temp": 0.0,
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "tokenizer.chat_template": (micro / "models" / "base" / "chat_template.jinja").read_text(),
        SYSTEM_PROMPT: (micro / "data" / "formatted" / "system_prompt.txt").read_text(),
    }
    assert {name: values.get(name) for name in expected} == expected
    assert "Not for clinical use" in values["general.description"]
    assert bytes(micro) not in shipped.read_bytes()


@pytest.mark.parametrize(("name", "protocols"), [("tuned", [*PROTOCOLS]), ("base", [*PROTOCOLS]), ("merged", ["chat"])])
def test_there_is_a_prediction_for_every_question_and_protocol(micro: Path, name: str, protocols: list[str]) -> None:
    rows = table(micro / "metrics" / "predictions" / f"{name}.csv")
    truth = numbers(micro / "data" / "raw" / "test_ground_truth.json")
    assert [(row["protocol"], row["pmid"]) for row in rows] == [(p, pmid) for p in protocols for pmid in sorted(truth)]
    for row in rows:
        scores = {label: float(row[label]) for label in LABELS}
        assert row["label"] == truth[row["pmid"]]
        assert 0 < sum(map(math.exp, scores.values())) <= 1 + 1e-5
        assert row["prediction"] == max(scores, key=lambda label: scores[label])
        assert row["greedy"] in ((*LABELS, UNPARSABLE) if row["protocol"] == "chat" else [""])


@pytest.mark.parametrize(("name", "metrics"), [("tuned", "evaluate"), ("base", "baseline")])
def test_scores_are_those_that_scikit_learn_gives_the_predictions(micro: Path, name: str, metrics: str) -> None:
    """PubMedQA's own rule: accuracy and macro-F1 over all and only the PMIDs of the ground truth."""
    from sklearn.metrics import accuracy_score, f1_score

    scores = numbers(micro / "metrics" / f"{metrics}.json")
    for protocol in PROTOCOLS:
        rows = [row for row in table(micro / "metrics" / "predictions" / f"{name}.csv") if row["protocol"] == protocol]
        gold, found = [row["label"] for row in rows], [row["prediction"] for row in rows]
        about = scores[protocol]
        assert (about["version"], about["questions"]) == (PROTOCOLS[protocol].version, 20)
        assert about["accuracy"]["value"] == pytest.approx(accuracy_score(gold, found), abs=1e-6)
        macro_f1 = f1_score(gold, found, labels=LABELS, average="macro", zero_division=0)
        assert about["macro_f1"] == pytest.approx(macro_f1, abs=1e-6)


def test_the_base_is_credited_with_the_protocol_chosen_on_the_validation_questions(micro: Path) -> None:
    baseline, compared = (numbers(micro / "metrics" / f"{name}.json") for name in ("baseline", "compare"))
    choice = baseline["base_protocol"]
    assert compared["base_protocol"] == choice
    assert (choice["questions"], choice["accuracy"].keys()) == (8, {"chat", "lm_eval"})
    assert choice["accuracy"][choice["chosen"]]["value"] == max(of["value"] for of in choice["accuracy"].values())
    assert compared["base"]["accuracy"]["value"] == baseline[choice["chosen"]]["accuracy"]["value"]


def test_slices_have_the_facts_of_the_test_questions(micro: Path) -> None:
    records = numbers(micro / "data" / "raw" / "ori_pqal.json")
    years = [int(records[row.pmid]["YEAR"]) for row in questions(micro)]
    found = numbers(micro / "metrics" / "compare.json")["slices"]
    assert {kind: sum(of["questions"] for of in values.values()) for kind, values in found.items()} == dict.fromkeys(
        ("label", "year", "abstract_words", "numeric_results"), 20
    )
    assert found["year"]["before 2005"]["questions"] == sum(year < 2005 for year in years)


def test_a_protocol_the_reference_written_answers_and_further_files_can_be_off_and_the_report_does_without(
    project: Path,
) -> None:
    further = project / "metrics/predictions/files"
    (rows,) = ([row["protocol"] for row in table(path)] for path in further.iterdir())
    assert rows == ["chat"] * 20
    compared = numbers(project / "metrics/compare.json")
    assert compared["answers"].keys() == {"tuned", "base", "tuned_minus_base"}
    assert compared["files"].keys() == {"Q4_K_M", "IQ3_XS"}

    shutil.rmtree(project / "models/merged")
    left_over = project / "metrics/predictions/.merged.gguf.partial"
    left_over.write_text("of a run that was killed")
    assert call(project, "reference", enabled=False) == ""
    assert not left_over.exists()
    assert table(project / "metrics/predictions/merged.csv") == []

    (project / "models/medical-reasoner.gguf").rename(project / "kept.gguf")
    assert call(project, "generate", enabled=False) == ""
    assert (project / "data/answers.jsonl").read_bytes() == b""
    (project / "kept.gguf").rename(project / "models/medical-reasoner.gguf")

    (project / "models/quantized/SHA256SUMS").write_text("")
    assert call(project, "evaluate", protocols=["question_only", "chat"]) == ""
    assert "lm_eval" not in numbers(project / "metrics/evaluate.json")
    (path,) = further.iterdir()
    assert (path.name, table(path)) == ("none.csv", [])  # git keeps no empty directory

    assert call(project, "report") == ""
    compared = numbers(project / "metrics/compare.json")
    assert compared["tuned"]["protocols"].keys() == {"question_only"}
    assert compared["files"].keys() == {"Q4_K_M"}
    assert not [name for name in compared if "merged" in name or name == "answers"]
    assert "ROUGE" not in (project / "models/release/README.md").read_text()


def written_answers(project: Path, model: str) -> dict[str, Answer]:
    rows = read_rows(project / "data/answers.jsonl", Answer)
    assert len(rows) == 40
    return {row.pmid: row for row in rows if row.model == model}


@pytest.mark.parametrize("model", ["tuned", "base"])
def test_each_model_writes_an_answer_to_each_question_that_begins_as_it_was_measured(micro: Path, model: str) -> None:
    found = written_answers(micro, model)
    rows = [row for row in table(micro / f"metrics/predictions/{model}.csv") if row["protocol"] == "chat"]
    assert list(found) == [row["pmid"] for row in rows]
    limit = yaml.load((micro / "params.yaml").read_text())["generate"]["max_new_tokens"]
    for row in rows:
        answer = found[row["pmid"]]
        if row["greedy"] != UNPARSABLE:
            assert parse_decision(answer.text, finished=True) == row["greedy"]
        assert answer.tokens < limit if answer.ended else answer.tokens == limit


def test_a_written_answer_is_the_likeliest_token_after_all_before_it(micro: Path, scorer: Scorer) -> None:
    for question, answer in list(zip(questions(micro), written_answers(micro, "tuned").values(), strict=True))[:3]:
        tokens, said = scorer.tokenize(scorer.template.prompt(chat(question))), b""
        for _ in range(answer.tokens):
            _, first = scorer.score(tokens, {})
            tokens.append(int(first.argmax()))
            said += scorer.piece(tokens[-1])
        assert said.decode(errors="replace").strip() == answer.text


def test_a_prompt_without_room_for_an_answer_is_refused_before_the_first_is_written(project: Path) -> None:
    sentence = call(project, "generate", n_ctx=64)
    assert re.fullmatch(r"generate: PMID \d+: .* raise generate\.n_ctx in params\.yaml to \d+ or more.*", sentence)
    assert not (project / ".checkpoints").exists()


def test_the_reference_is_the_merged_model_at_16_bits(micro: Path, wide: Path) -> None:
    with Scorer(wide, 2048, "") as scorer:
        for row, asked in zip(table(micro / "metrics/predictions/merged.csv")[:5], questions(micro), strict=False):
            scores, _ = scorer.score(*scorer.encode(PROTOCOLS["chat"].prompt(asked), PROTOCOLS["chat"]))
            assert {label: f"{scores[label]:.6f}" for label in LABELS} == {label: row[label] for label in LABELS}


@pytest.mark.parametrize("function", ["llama_decode", "llama_get_logits_ith"])
def test_a_failed_question_ends_the_stage_with_its_pmid_and_is_never_a_maybe(
    project: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    logits = np.ctypeslib.as_ctypes(np.full(1 << 17, np.nan, dtype=np.float32))
    monkeypatch.setattr(f"llama_cpp.{function}", lambda *_: 1 if function == "llama_decode" else logits)
    sentence = call(project, "evaluate")
    assert sentence.startswith("evaluate: data/formatted/test.jsonl, PMID 900000040: ")
    assert ("llama_decode returned 1" if function == "llama_decode" else "not finite") in sentence
    assert not (project / ".checkpoints").exists()
