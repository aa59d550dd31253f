"""What each stage makes of the micro profile."""

import csv
import json
import math
import shutil
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.records import sha256
from pipeline.core.stage import Fail, scratch
from pipeline.models import gguf
from pipeline.models.weights import describe
from pipeline.scoring import scorer as scoring
from pipeline.scoring.measures import COLUMNS, UNPARSABLE
from pipeline.scoring.predict import Params, predict
from pipeline.scoring.protocols import LABELS, PROTOCOLS
from pipeline.scoring.scorer import Scorer
from tests.conftest import ROOT, run_command, run_stage, stages, yaml
from tests.hub import COMMIT, serve

MODEL = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
FILES = {
    "data/raw": {"ori_pqal.json", "source.json", "test_ground_truth.json"},
    "data/formatted": {"test.jsonl", "train.jsonl", "validation.jsonl"},
    "models/base": MODEL,
    "models/adapter": {"adapter_config.json", "adapter_model.safetensors", "trained_on.json"},
    "models/merged": MODEL,
    "models": {"medical-reasoner.gguf"},
}
PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
TARGETS = {f"model.layers.0.{block}.{name}.weight" for name, block in PROJECTIONS.items()}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def numbers(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


# every stage


def test_files_all_and_only(micro: Path):
    for directory, names in FILES.items():
        assert {path.name for path in (micro / directory).iterdir() if path.is_file()} == names, directory
    declared = {
        path
        for stage in stages(micro).values()
        for kind in ("outs", "metrics", "plots")
        for out in stage.get(kind, [])
        for path in ([out] if isinstance(out, str) else out)
    }
    metrics = {str(path.relative_to(micro)) for path in (micro / "metrics").rglob("*") if path.is_file()}
    plots = {path for path in declared if (micro / path).is_dir()}
    assert {path for path in metrics if not any(path.startswith(f"{plot}/") for plot in plots)} <= declared
    assert not [path for path in declared if not (micro / path).exists()]
    assert not list(micro.rglob("*.partial"))


HELP = [
    ("download", "PubMedQA, a mirror of it, a hospital's own questions or the simulated trials -> data/raw"),
    ("base", "A hub model, a local directory or the embedded tiny Llama -> models/base"),
    ("format", "PubMedQA records -> chat messages"),
    ("train", "formatted examples and a base -> a LoRA adapter"),
    ("merge", "base + LoRA adapter -> models/merged"),
    ("quantize", "models/merged -> models/medical-reasoner.gguf"),
    ("evaluate", "the GGUF that ships and the test questions -> a prediction for each"),
    ("reference", "the merged model at 16 bits and the test questions -> its predictions"),
    ("baseline", "what the tuned model must beat"),
    ("report", "the predictions of all models -> their comparison"),
]


@pytest.mark.parametrize(("stage", "words"), HELP)
def test_help_says_what_becomes_what_without_importing_torch(micro: Path, stage: str, words: str):
    # A module that cannot be imported stands in for torch.
    (micro.parent / "no_torch").mkdir(exist_ok=True)
    (micro.parent / "no_torch" / "torch.py").write_text("raise ImportError('--help must not need torch')")
    command = f"python3 -m pipeline.{stage} --help"
    result = run_command(micro, command, PYTHONPATH=str(micro.parent / "no_torch"), COLUMNS="200")
    assert result.returncode == 0, result.stderr
    assert words.lower() in " ".join(result.stdout.split()).lower()


def test_every_stage_of_the_pipeline_has_help(micro: Path):
    assert {stage for stage, _ in HELP} == set(stages(micro))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("base", {"weight_bytes", "loss", "heldout_accuracy"}),
        ("format", {"train", "validation", "test", "test_overlap"}),
        ("train", {"first_loss", "last_loss", "validation_loss"}),
        (
            "train_resources",
            {
                "peak_vram_allocated_mib",
                "peak_vram_reserved_mib",
                "peak_rss_mib",
                "resumed_after_step",
                "seconds",
                "tokens_per_second",
            },
        ),
        ("merge_resources", {"seconds", "peak_rss_mib"}),
        ("quantize_resources", {"seconds", "peak_rss_mib"}),
        ("evaluate", {*PROTOCOLS, "gguf_bytes", "n_ubatch"}),
        ("baseline", {*PROTOCOLS, "majority_accuracy", "majority_macro_f1", "tfidf_accuracy", "tfidf_macro_f1"}),
        ("evaluate_resources", {"load_seconds", "questions_per_second", "tokens_per_second", "peak_rss_mib"}),
        ("reference_resources", {"load_seconds", "questions_per_second", "tokens_per_second", "peak_rss_mib"}),
        ("baseline_resources", {"load_seconds", "questions_per_second", "tokens_per_second", "peak_rss_mib"}),
    ],
)
def test_metrics(micro: Path, name: str, keys: set[str]):
    values = numbers(micro / "metrics" / f"{name}.json")
    assert keys <= values.keys()
    assert all(isinstance(value, dict) or math.isfinite(value) for value in values.values())


# download and format


def test_simulated_data_says_so(micro: Path):
    assert numbers(micro / "data" / "raw" / "source.json")["simulated"] is True


def test_splits(micro: Path):
    splits = {name: rows_of(micro / "data" / "formatted" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 32, "validation": 8, "test": 40}
    truth = numbers(micro / "data" / "raw" / "test_ground_truth.json")
    assert {row["pmid"]: row["label"] for row in splits["test"]} == truth
    assert len({row["pmid"] for rows in splits.values() for row in rows}) == 80
    for row in splits["train"]:
        assert row.keys() == {"pmid", "label", "prompt", "completion"}
        assert row["completion"][0]["content"].lower().startswith(row["label"])


def test_token_lengths_are_the_tokenizers_own(micro: Path):
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(micro / "models" / "base")
    rows = rows_of(micro / "data" / "formatted" / "train.jsonl")
    expected = [len(tokenizer.apply_chat_template(r["prompt"] + r["completion"], return_dict=False)) for r in rows]
    written = rows_of(micro / "metrics" / "token_lengths.csv")
    assert [int(row["tokens"]) for row in written if row["split"] == "train"] == expected
    assert numbers(micro / "metrics" / "format.json")["train"]["tokens_max"] == max(expected)


# train


@pytest.fixture(scope="module")
def trainer(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`train`'s own trainer, before its first step, on a few of the micro profile's questions."""
    from pipeline.stages import train

    params = train.Params.check("train", yaml.load((micro / "params.yaml").read_text())["train"])
    model, tokenizer = train.quantized_lora(params, micro / "models" / "base")
    rows = rows_of(micro / "data" / "formatted" / "train.jsonl")[:4]
    work = tmp_path_factory.mktemp("trainer")
    return train.build_trainer(params, model, tokenizer, {"train": rows, "validation": rows[:1]}, work)


def test_what_is_trained_is_the_adapter_in_float32(trainer: Any):
    import torch
    from bitsandbytes.nn import Linear4bit

    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].split("base_model.model.")[1] + ".weight" for name in trained} == TARGETS
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    quantized = [module for module in trainer.model.modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == len(TARGETS)
    assert {module.weight.quant_type for module in quantized} == {"nf4"}


def test_the_loss_is_on_the_assistants_turn_alone(micro: Path, trainer: Any):
    tokenizer = trainer.processing_class
    for row, example in zip(rows_of(micro / "data" / "formatted" / "train.jsonl"), trainer.train_dataset, strict=False):
        batch = trainer.data_collator([example])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        text = f"{row['completion'][0]['content']}<|eot_id|>"
        learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        assert tokenizer.decode(learnt) == text
        assert [label for label in labels if label != -100] == learnt
        assert tokenizer.decode(ids).endswith(f"<|start_header_id|>assistant<|end_header_id|>\n\n{text}")
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_longer_example_is_refused_not_cut(micro: Path, trainer: Any):
    from pipeline.stages.train import check_lengths

    rows = rows_of(micro / "data" / "formatted" / "train.jsonl")
    longest = numbers(micro / "metrics" / "format.json")["train"]["tokens_max"]
    check_lengths(rows, trainer.processing_class, longest)
    with pytest.raises(
        Fail, match=rf"train\.max_length: .*longest {longest}, PMID 9000000\d\d\); raise it to {longest}"
    ):
        check_lengths(rows, trainer.processing_class, longest - 1)


def test_the_adapter(micro: Path):
    adapter = micro / "models" / "adapter"
    config = numbers(adapter / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (16, 16, "LORA")
    assert config["target_modules"] == sorted(PROJECTIONS)
    assert str(micro) not in (adapter / "adapter_config.json").read_text()
    matrices = tensors(adapter / "adapter_model.safetensors")
    assert len(matrices) == 2 * len(TARGETS)
    for name, matrix in matrices.items():
        assert matrix.abs().max() > 0, name  # B starts at 0


def test_training_leaves_the_base_alone(micro: Path):
    base = micro / "models" / "base"
    manifest = numbers(base / "manifest.json")
    assert describe(base) == manifest["files"]  # written before the training
    assert numbers(micro / "models" / "adapter" / "trained_on.json") == {
        "adapter": sha256(micro / "models" / "adapter" / "adapter_model.safetensors"),
        "files": manifest["files"],
    }


def test_a_row_a_step(micro: Path):
    log, memory = (rows_of(micro / "metrics" / f"train_{name}.csv") for name in ("log", "memory"))
    steps = [str(step) for step in range(1, yaml.load((micro / "params.yaml").read_text())["train"]["max_steps"] + 1)]
    assert [row["step"] for row in log] == [row["step"] for row in memory] == steps
    assert [list(row) for row in log[:1]] == [["step", "loss", "learning_rate", "grad_norm"]]
    assert all(math.isfinite(float(value)) for row in log + memory for value in row.values())
    assert all(float(row["rss_mib"]) > 100 for row in memory)
    metrics = numbers(micro / "metrics" / "train.json")
    assert [metrics["first_loss"], metrics["last_loss"]] == [float(log[i]["loss"]) for i in (0, -1)]


# merge


@pytest.mark.parametrize("alpha", [16, 40])
def test_merge(micro: Path, project: Path, alpha: int):
    import torch

    config = numbers(project / "models" / "adapter" / "adapter_config.json")
    (project / "models" / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    assert run_stage(project, "merge").returncode == 0
    base, adapter, merged = (
        tensors(project / "models" / path)
        for path in ("base/model.safetensors", "adapter/adapter_model.safetensors", "merged/model.safetensors")
    )
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        assert merged[name].dtype == weight.dtype
        if name not in TARGETS:
            assert merged[name].equal(weight), name
            continue
        a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        exact = (weight.double() + alpha / 16 * b.double() @ a.double()).to(torch.bfloat16)
        steps = exact.view(torch.int16).int() - merged[name].view(torch.int16).int()  # in bfloat16's last place
        assert steps.abs().max() <= 1, name
        assert (steps != 0).float().mean() < 1e-3, name
        assert not merged[name].equal(weight), name
    for name in MODEL - {"model.safetensors"}:
        assert (project / "models" / "merged" / name).read_bytes() == (micro / "models" / "base" / name).read_bytes()


# quantize

# llama.cpp's llama_tensor_get_type for Q4_K_M: these three in Q6_K (here the one layer is the first of its layers).
Q6 = {"output.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A GGUF's metadata, and the type of every matrix in it."""
    from gguf import GGUFReader

    reader: Any = GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return {name: field.contents() for name, field in reader.fields.items()}, types


def test_the_gguf(micro: Path):
    values, types = read_gguf(micro / "models" / "medical-reasoner.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "medical-reasoner",
        "general.version": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "general.file_type": 15,  # Q4_K_M
        "general.sampling.temp": 0.0,
        "llama.embedding_length": 256,
        "llama.block_count": 1,
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.chat_template": (micro / "models" / "base" / "chat_template.jinja").read_text(),
    }
    assert {name: values[name] for name in expected} == expected
    assert "Not for clinical use" in values["general.description"]
    assert str(micro) not in str(values)
    assert types == {name: "Q6_K" if name in Q6 else "Q4_K" for name in types}
    assert types.keys() >= Q6
    assert len(types) == len(TARGETS) + 2


# evaluate and baseline


@pytest.mark.parametrize(("name", "protocols"), [("tuned", PROTOCOLS), ("base", PROTOCOLS), ("merged", ["chat"])])
def test_predictions(micro: Path, name: str, protocols: Iterable[str]):
    rows = rows_of(micro / "metrics" / "predictions" / f"{name}.csv")
    assert list(rows[0]) == COLUMNS
    truth = numbers(micro / "data" / "raw" / "test_ground_truth.json")
    assert [(row["protocol"], row["pmid"]) for row in rows] == [(p, pmid) for p in protocols for pmid in sorted(truth)]
    for row in rows:
        scores = {label: float(row[label]) for label in LABELS}
        assert row["label"] == truth[row["pmid"]]
        assert 0 < sum(math.exp(score) for score in scores.values()) <= 1
        assert row["prediction"] == max(scores, key=lambda label: scores[label])
        assert row["greedy"] in ((*LABELS, UNPARSABLE) if row["protocol"] == "chat" else [""])
        assert 0 <= int(row["top_token"]) < 1024
        assert all(len(row[label].split(".")[1]) == 6 for label in LABELS)


@pytest.mark.parametrize(("table", "metrics"), [("tuned", "evaluate"), ("base", "baseline")])
def test_the_scores_of_each_protocol_are_those_of_its_predictions(micro: Path, table: str, metrics: str):
    rows = rows_of(micro / "metrics" / "predictions" / f"{table}.csv")
    scores = numbers(micro / "metrics" / f"{metrics}.json")
    keys = {"questions", "accuracy", "accuracy_low", "accuracy_high", "macro_f1"}
    keys |= {f"{measure}_{label}" for measure in ("precision", "recall", "predicted") for label in LABELS}
    keys |= {f"confusion_{gold}_{label}" for gold in LABELS for label in LABELS}
    for protocol, version in PROTOCOLS.items():
        asked = [row for row in rows if row["protocol"] == protocol]
        right = sum(row["label"] == row["prediction"] for row in asked)
        assert keys <= scores[protocol].keys()
        assert scores[protocol]["version"] == version
        assert scores[protocol]["accuracy"] == pytest.approx(right / len(asked), abs=1e-6)
    assert "unparsable_rate" in scores["chat"]
    if table == "tuned":
        assert scores["gguf_bytes"] == (micro / "models" / "medical-reasoner.gguf").stat().st_size


def test_a_protocol_is_asked_only_if_its_parameter_names_it(project: Path):
    for protocols in (["chat"], ["chat", "question_only"]):
        assert run_stage(project, "evaluate", protocols=protocols).returncode == 0
        assert [name for name in numbers(project / "metrics" / "evaluate.json") if name in PROTOCOLS] == protocols
    assert run_stage(project, "report").returncode == 0
    assert "tuned_lm_eval_accuracy" not in numbers(project / "metrics" / "compare.json")


def test_the_reference_is_the_merged_model_at_16_bits_and_may_be_off(project: Path, wide: Path):
    params = Params(protocols=["chat"], n_ctx=2048, max_new_tokens=8)
    predict(wide, project / "data" / "formatted" / "test.jsonl", params, project / "again.csv")
    table = project / "metrics" / "predictions" / "merged.csv"
    assert (project / "again.csv").read_bytes() == table.read_bytes()
    assert numbers(project / "metrics" / "compare.json")["tuned_minus_merged_kl"] > 0
    shutil.rmtree(project / "models" / "merged")
    with scratch(table.parent / "merged.gguf") as left_over:
        pass
    left_over.write_text("of a run that was killed")
    assert run_stage(project, "reference", enabled=False).returncode == 0
    assert not left_over.exists()
    assert table.read_text().splitlines() == [",".join(COLUMNS)]
    assert run_stage(project, "report").returncode == 0
    assert not [name for name in numbers(project / "metrics" / "compare.json") if "merged" in name]
    assert "16 bits" not in (project / "models" / "release" / "README.md").read_text()


def test_base_and_tuned_are_asked_the_same_and_answer_otherwise(micro: Path):
    tuned, base = (rows_of(micro / "metrics" / "predictions" / f"{name}.csv") for name in ("tuned", "base"))
    assert [row["pmid"] for row in tuned] == [row["pmid"] for row in base]
    assert [row["yes"] for row in tuned] != [row["yes"] for row in base]


def test_the_majority_row_on_simulated_data(micro: Path):
    # 22 yes, 14 no, 4 maybe of 40
    metrics = numbers(micro / "metrics" / "baseline.json")
    assert metrics["majority_accuracy"] == 22 / 40
    assert metrics["majority_macro_f1"] == pytest.approx(44 / 62 / 3)


def test_the_order_of_the_questions_changes_nothing(micro: Path, tmp_path: Path):
    lines = (micro / "data" / "formatted" / "test.jsonl").read_text().splitlines(keepends=True)
    model, params = (
        micro / "models" / "medical-reasoner.gguf",
        Params(protocols=list(PROTOCOLS), n_ctx=2048, max_new_tokens=8),
    )
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines)))
    predict(model, tmp_path / "turned.jsonl", params, tmp_path / "turned.csv")
    written = (micro / "metrics" / "predictions" / "tuned.csv").read_text().splitlines()
    turned = (tmp_path / "turned.csv").read_text().splitlines()
    assert turned != written
    assert sorted(turned) == sorted(written)


@pytest.fixture(scope="module")
def wide(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model in 16 bit."""
    target = tmp_path_factory.mktemp("wide") / "wide.gguf"
    gguf.convert(micro / "models" / "merged", target, {})
    return target


@pytest.mark.parametrize(("quant_type", "file_type"), [("Q8_0", 7), ("Q6_K", 18)])
def test_another_quantization(wide: Path, tmp_path: Path, quant_type: str, file_type: int):
    gguf.quantize(wide, tmp_path / "other.gguf", quant_type)
    values, types = read_gguf(tmp_path / "other.gguf")
    assert values["general.file_type"] == file_type
    assert set(types.values()) == {quant_type}


@pytest.mark.parametrize(("model", "tolerance"), [("wide", 5e-3), ("shipped", 0.2)])
def test_the_size_of_a_batch_hardly_changes_a_score(
    micro: Path, wide: Path, monkeypatch: pytest.MonkeyPatch, model: str, tolerance: float
):
    """llama.cpp's kernels round otherwise for other sizes, so N_UBATCH is fixed and told in metrics/evaluate.json."""
    path = wide if model == "wide" else micro / "models" / "medical-reasoner.gguf"
    rows = rows_of(micro / "data" / "formatted" / "test.jsonl")[:10]
    scores: list[list[float]] = []
    for size in (scoring.N_UBATCH, 64, 7):
        monkeypatch.setattr(scoring, "N_UBATCH", size)
        with Scorer(path, 2048) as scorer:
            scores.append([p for row in rows for p in scorer.score(*scorer.chat(row["prompt"]))[0].values()])
    assert scores[1] == pytest.approx(scores[0], abs=tolerance)
    assert scores[2] == pytest.approx(scores[0], abs=tolerance)


@pytest.fixture
def question(micro: Path) -> list[dict[str, str]]:
    return rows_of(micro / "data" / "formatted" / "test.jsonl")[0]["prompt"]


# Long forms stand alone or with each other: beside a form of one token their share would not show.
FORMS = {
    "yes": ["yes", "Yes"],
    "no": ["No effect was seen", "no, it is not so"],
    "maybe": ["It may be so"],
}
OF_TWO_TOKENS = {"yes": ["yes"], "no": ["No."], "maybe": ["Maybe, yes"]}


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        (FORMS, {"yes": 1, "no": 7, "maybe": 6}),
        (OF_TWO_TOKENS, {"yes": 1, "no": 2, "maybe": 3}),
    ],
    ids=["long", "of two tokens"],
)
def test_answers_of_several_tokens_equal_separate_evaluation(
    wide: Path,
    question: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    words: dict[str, list[str]],
    lengths: dict[str, int],
):
    from llama_cpp import Llama

    monkeypatch.setattr(scoring, "surface_forms", words.__getitem__)
    with Scorer(wide, 2048) as scorer:
        assert {label: min(map(len, forms)) for label, forms in scorer.forms.items()} == lengths
        prompt, forms = scorer.chat(question)
        together, first = scorer.score(prompt, forms)
        greedy = scorer.greedy(first, len(prompt), 8)
    model = Llama(str(wide), n_ctx=2048, n_batch=2048, logits_all=True, flash_attn=False, verbose=False)
    for label in LABELS:
        total = 0.0
        for form in forms[label]:
            model.reset()
            model.eval(prompt + form)
            logits = model.scores[len(prompt) - 1 : len(prompt) + len(form) - 1].astype(np.float64)
            chosen = logits[range(len(form)), form] - np.log(np.exp(logits).sum(axis=1))
            total += math.exp(chosen.sum())
        assert together[label] == pytest.approx(math.log(total), abs=5e-6)
    # The greedy answer goes on from the prompt, whatever the labels' own tokens were.
    model.reset()
    model.eval(prompt)
    text = ""
    for _ in range(8):
        token = int(model.scores[model.n_tokens - 1].argmax())
        text += model.detokenize([token]).decode(errors="replace")
        model.eval([token])
    assert greedy == (scoring.parse_decision(text, finished=False) or UNPARSABLE)
    model.close()


class TestAFailedQuestion:
    """It ends the stage, with the question's PMID; it never becomes a 'maybe'."""

    @pytest.fixture
    def evaluate(self, micro: Path, tmp_path: Path) -> Callable[..., None]:
        def run(n_ctx: int = 2048) -> None:
            model, test = micro / "models" / "medical-reasoner.gguf", micro / "data" / "formatted" / "test.jsonl"
            params = Params(protocols=["chat"], n_ctx=n_ctx, max_new_tokens=8)
            predict(model, test, params, tmp_path / "tuned.csv")

        return run

    def test_a_prompt_that_is_too_long(self, evaluate: Callable[..., None]):
        with pytest.raises(Fail, match=r"test\.jsonl, PMID 900000040: .*evaluate\.n_ctx .*from 128"):
            evaluate(n_ctx=128)

    def test_llama_cpp_refuses(self, evaluate: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
        import llama_cpp

        monkeypatch.setattr(llama_cpp, "llama_decode", lambda context, batch: 1)
        with pytest.raises(Fail, match=r"PMID 900000040: .*llama_decode returned 1"):
            evaluate()

    def test_logits_that_are_no_numbers(self, evaluate: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
        import llama_cpp

        nothing = np.full(1 << 17, np.nan, dtype=np.float32)
        pointer = np.ctypeslib.as_ctypes(nothing)
        monkeypatch.setattr(llama_cpp, "llama_get_logits_ith", lambda context, index: pointer)
        with pytest.raises(Fail, match=r"PMID 900000040: .*not finite"):
            evaluate()

    def test_no_room_for_the_answer(self, micro: Path, question: list[dict[str, str]]):
        model = micro / "models" / "medical-reasoner.gguf"
        with Scorer(model, 2048) as scorer:
            prompt, forms = scorer.chat(question)
        count = len(prompt)
        with Scorer(model, count) as scorer:
            _, first = scorer.score(prompt, forms)
            assert scorer.greedy(first, count, 1)
            with pytest.raises(Fail, match=r"evaluate\.n_ctx"):
                scorer.greedy(first, count, 8)


# a hub's base


def test_a_base_on_a_hub_becomes_the_same_gguf_but_for_its_name(project: Path):
    """The weights are not in models/base, and the chat template is in tokenizer_config.json, as with Llama 3."""
    base = project / "models" / "base"
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.name != "manifest.json"}
    template = files.pop("chat_template.jinja").decode()
    files["tokenizer_config.json"] = json.dumps(
        json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    ).encode()
    params = yaml.load((project / "params.yaml").read_text())
    params["base"] = {"source": "hub", "repo_id": "org/Llama-3-tiny", "revision": COMMIT}
    (project / "params.yaml").write_text(json.dumps(params))
    with serve() as server:
        server.add_repository("org/Llama-3-tiny", files)
        for stage in ("base", "format", "merge", "quantize"):
            command = stages(project)[stage]["cmd"]
            result = run_command(project, command, HF_ENDPOINT=server.url, HF_HOME=str(project / "hub"))
            assert result.returncode == 0, result.stderr
    assert not list(base.glob("*.safetensors"))
    values, _ = read_gguf(project / "models" / "medical-reasoner.gguf")
    assert values["general.name"] == "Llama-3-8B-medical-reasoner"  # Llama 3's licence: derivatives are named after it
    assert values["tokenizer.chat_template"] == template
