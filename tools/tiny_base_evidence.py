"""Measure what is claimed of the tiny base: `python -m tools.tiny_base_evidence` prints it and keeps it as JSON.

Each run is the default project in a directory of its own, with another seed of the data or of the training: the
stages' own commands make adapter, GGUF and predictions on this machine. Then the GGUF writes its conclusions as
`pipeline.commands.ask` does, and each is compared with the sentences that would be right.

`python -m tools.tiny_base_evidence max_steps=40 learning_rate=3e-3` measures other parameters of `train`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llama_cpp
from gguf import GGUFReader
from ruamel.yaml import YAML
from tqdm import tqdm

from pipeline.commands.ask import N_CTX, conclusion
from pipeline.core.files import read_rows, sha256
from pipeline.core.labels import LABELS
from pipeline.core.question import Question
from pipeline.models.directory import TINY_BASE
from pipeline.scoring.measures import Scores, rounded, score
from pipeline.scoring.predictions import Prediction, read_predictions
from pipeline.scoring.protocols import PROTOCOLS, chat
from pipeline.scoring.scorer import Scorer, decide
from pipeline.simulated.trials import SEEN, UNSEEN, VERBS

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "tiny_base.json"
RUNS = [*((1, seed) for seed in (3407, 1, 2, 3)), (2, 3407)]  # seeds of the data and of the training
STAGES = ("download", "base", "format", "train", "merge", "quantize", "evaluate", "reference", "baseline")
CLOSE = 0.05  # natural-log probability between the two best labels below which other arithmetic may turn a decision
HARD = "naïve 12345 ½  x\n\n\ty 日本 🙂'LL"  # text that tokenizers disagree on
HEADER = (
    "data train  tuned F1    recall yes no maybe   base  lm_eval  predicted yes no maybe  "
    "TF-IDF  Q4 agrees  right  patients  train s"
)
Record = dict[str, Any]  # a simulated question in PQA-L's schema
yaml = YAML()


def right_sentences(record: Record, decision: str) -> Iterator[tuple[str, str]]:
    """Each conclusion that says `decision` to a simulated question with its own words, and the patients it names.

    Treatment and outcome are the record's, to the letter; the verb has the question's direction.
    """
    treatment, outcome = (word.lower() for word in record["MESHES"][1:])
    asked = set(record["QUESTION"].lower().strip("?").split())
    verbs = next(words for words in VERBS.values() if asked.intersection(words))
    for template in (*SEEN.conclusions[decision], *UNSEEN.conclusions[decision]):
        for verb, patients in product(verbs, (*SEEN.patients, *UNSEEN.patients)):
            sentence = template.format(T=treatment, Y=outcome, verb=verb, patients=patients)
            yield sentence[0].upper() + sentence[1:], patients if "{patients}" in template else ""


def judge(text: str, record: Record, decision: str) -> tuple[bool, bool]:
    """Whether an answer is a right conclusion to `decision`, and whether its prompt names the patients it names."""
    given = " ".join([record["QUESTION"], *record["CONTEXTS"]]).lower()
    for sentence, patients in right_sentences(record, decision):
        if text == f"{decision.capitalize()}. {sentence}":
            return True, patients in given
    return False, False


def ended(scorer: Scorer) -> bool:
    """Whether the last token's likeliest successor ends the turn; false if the answer was cut at its longest."""
    return scorer.ends(int(scorer.log_probabilities(-1).argmax()))


def conclusions(scorer: Scorer, asked: list[Question], records: dict[str, Record]) -> dict[str, Any]:
    """Shares of right conclusions over questions, and up to ten that are wrong."""
    right: list[bool] = []
    stated: list[bool] = []
    wrong: list[dict[str, str]] = []
    for question in tqdm(asked, "conclusions"):
        record = records[question.pmid]
        tokens, choices = scorer.encode(chat(question), PROTOCOLS["chat"])
        decision = decide(scorer.score(tokens, choices)[0])
        text = "".join(conclusion(scorer, decision, len(tokens)))
        found = judge(text, record, decision) if ended(scorer) else (False, False)
        right.append(found[0])
        stated.append(all(found))
        if not found[0]:
            wrong.append({"question": record["QUESTION"], "answer": text})
    return {
        "right": sum(right) / len(right),
        "right_and_patients_stated": sum(stated) / len(stated),
        "wrong_examples": wrong[:10],
    }


def close(row: Prediction) -> bool:
    """Whether the two best labels are closer than `CLOSE`."""
    best, second, _ = sorted(row.log_probabilities, reverse=True)
    return best - second < CLOSE


def figures(scores: Scores) -> dict[str, Any]:
    """Accuracy, macro-F1, each label's recall and its share of the predictions."""
    return {
        "accuracy": scores.accuracy.value,
        "macro_f1": scores.macro_f1,
        "recall": scores.recall.model_dump(),
        "predicted": scores.predicted.model_dump(),
    }


def tensor_types(gguf: Path) -> dict[str, int]:
    """ggml type -> number of tensors: Q4_K_M is Q4_K, Q6_K and F32; Q5_0, Q8_0 or F16 would be a fallback."""
    types = [tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors]
    return {name: types.count(name) for name in sorted(set(types))}


def same_token_ids(scorer: Scorer, asked: list[Question]) -> bool:
    """Whether llama.cpp and transformers read every prompt, and a text that is hard to read, as the same token ids."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(TINY_BASE)
    texts = [HARD, *(scorer.template.prompt(chat(question)) for question in asked)]
    return all(scorer.tokenize(text) == tokenizer.encode(text, add_special_tokens=False) for text in texts)


def run_stage(directory: Path, command: str) -> None:
    """Run a stage's command in `directory` with this interpreter as python3."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, cwd=directory, env=os.environ | {"PATH": path}, check=True)


def project(directory: Path, data_seed: int, train_seed: int, train: dict[str, Any]) -> dict[str, Any]:
    """Lay the default project out in `directory` with these seeds; returns the stages of its dvc.yaml."""
    shutil.copytree(ROOT / "pipeline", directory / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "pyproject.toml"):
        shutil.copyfile(ROOT / name, directory / name)
    params = yaml.load((ROOT / "profiles" / "tiny.yaml").read_text(encoding="utf-8"))
    params["download"]["seed"] = data_seed
    params["train"] |= {**train, "seed": train_seed}
    with (directory / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    return yaml.load((directory / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def measure(directory: Path, data_seed: int, train_seed: int, train: dict[str, Any]) -> dict[str, Any]:
    """Run the stages in `directory` and measure what they made."""
    stages = project(directory, data_seed, train_seed, train)
    for stage in STAGES:
        run_stage(directory, stages[stage]["cmd"])
    metrics, gguf = directory / "metrics", directory / "models" / "medical-reasoner.gguf"
    tuned, merged, base = (
        read_predictions(metrics / "predictions" / f"{name}.csv") for name in ("tuned", "merged", "base")
    )
    baseline = json.loads((metrics / "baseline.json").read_text(encoding="utf-8"))
    resources = json.loads((metrics / "train_resources.json").read_text(encoding="utf-8"))
    records = json.loads((directory / "data" / "raw" / "ori_pqal.json").read_text(encoding="utf-8"))
    test = read_rows(directory / "data" / "formatted" / "test.jsonl", Question)
    same = [first.prediction == second.prediction for first, second in zip(tuned["chat"], merged["chat"], strict=True)]
    with Scorer(gguf, N_CTX, "close other programs") as scorer:
        written = conclusions(scorer, test, records)
        same_ids = same_token_ids(scorer, test)
    return {
        "data_seed": data_seed,
        "train_seed": train_seed,
        "tuned": figures(score(tuned["chat"], 0.95)),
        "tuned_close_decisions": sum(map(close, tuned["chat"])) / len(test),
        "base": figures(score(base["chat"], 0.95)),
        "base_lm_eval": figures(score(base["lm_eval"], 0.95)),
        "tfidf_accuracy": baseline["tfidf"]["accuracy"]["value"],
        "q4_agreement": sum(same) / len(same),
        "conclusions": written,
        "tensor_types": tensor_types(gguf),
        "same_token_ids": same_ids,
        "train_seconds": resources["seconds"],
    }


def line(run: dict[str, Any]) -> str:
    """A run as a line of the printed table."""
    tuned, base, written = run["tuned"], run["base"], run["conclusions"]
    recalls = " ".join(f"{tuned['recall'][label]:.3f}" for label in LABELS)
    shares = " ".join(f"{base['predicted'][label]:.3f}" for label in LABELS)
    return (
        f"{run['data_seed']:4} {run['train_seed']:5}  {tuned['accuracy']:.3f} {tuned['macro_f1']:.3f}  {recalls}     "
        f"{base['accuracy']:.3f} {run['base_lm_eval']['accuracy']:.3f}    {shares}      {run['tfidf_accuracy']:.3f}   "
        f"{run['q4_agreement']:.3f}      {written['right']:.3f}  {written['right_and_patients_stated']:.3f}     "
        f"{run['train_seconds']:.0f}"
    )


def main() -> None:
    changes = {name: json.loads(value) for name, value in (pair.split("=") for pair in sys.argv[1:])}
    runs: list[dict[str, Any]] = []
    for data_seed, train_seed in RUNS:
        with TemporaryDirectory() as directory:
            runs.append(measure(Path(directory), data_seed, train_seed, changes))
        print(HEADER, line(runs[-1]), sep="\n", flush=True)
    print(HEADER, *map(line, runs), sep="\n")
    if not changes:
        files = {path.name: path.stat().st_size for path in sorted(TINY_BASE.iterdir())}
        about = {"llama_cpp_python": llama_cpp.__version__, "weights_sha256": sha256(TINY_BASE / "model.safetensors")}
        RESULT.write_text(json.dumps(rounded({**about, "bytes": files, "runs": runs}), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
