"""The table of the cross-validation: `python -m benchmarks.smollm2_recipe` reads smollm2_crossval.jsonl, writes .json.

All figures are of held-out answers to the 500 non-test questions of PubMedQA. An interval is a percentile bootstrap
over questions (10,000 draws, 95 %): a question's answers from several seeds go together, so that seeds do not count as
new questions. It holds the trained models fixed; the spread over folds and seeds stands beside it.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.smollm2_folds import FOLDS, HERE
from pipeline.core.dataset import read_dataset
from pipeline.core.labels import LABELS
from pipeline.scoring.measures import accuracy, macro_f1, recall

DRAWS = 10_000
MAYBE = LABELS.index("maybe")
REFERENCE = "lr 0.002, 4 epochs, decision x3"  # the recipe of profiles/smollm2-135m.yaml
NOT_TRIED = ["more than 4 epochs", "learning rates above 4e-3", "matrix products in float32: all are in TF32"]

Array = Any  # a numpy array: its shape stands in the docstring
Record = dict[str, Any]  # a training: configuration, seed, fold, and its answers
Answers = dict[tuple[int, str], list[float]]  # (seed, PMID) -> log-probabilities of LABELS


def name(config: dict[str, Any]) -> str:
    """A configuration in words: what differs from the profile's form is named, the rest is left out."""
    weight = "decision only" if config["conclusion"] == 0 else f"decision x{config['decision']:g}"
    parts = [f"lr {config['learning_rate']:g}", f"{config['epochs']} epochs", weight]
    parts += [f"r {config['r']}"] * (config["r"] != 16) + [f"batch {config['batch']}"] * (config["batch"] != 8)
    parts += ["balanced"] * config["balanced"] + ["float32"] * (not config["tf32"])
    return ", ".join(parts)


def read(path: Path) -> tuple[dict[str, list[Record]], dict[str, Answers]]:
    """Configuration -> its trainings by seed and fold; protocol -> the base's answers."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    base = next(record["base"] for record in records if "base" in record)
    trainings: dict[str, list[Record]] = defaultdict(list)
    for record in sorted((r for r in records if "config" in r), key=lambda r: (r["seed"], r["fold"])):
        trainings[name(record["config"])].append(record)
    answers = {protocol: {(0, pmid): logs for pmid, logs in found.items()} for protocol, found in base.items()}
    return dict(sorted(trainings.items())), answers


def collect(records: list[Record], kind: str) -> Answers:
    """The trainings' answers, by the adapter folded into one of the bases: `merged` or `nf4`."""
    return {(record["seed"], pmid): logs for record in records for pmid, logs in record[kind].items()}


def whole_seeds(records: list[Record]) -> dict[int, list[Record]]:
    """Seed -> its trainings, if it has one for each fold."""
    by_seed: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_seed[record["seed"]].append(record)
    return {seed: found for seed, found in by_seed.items() if len(found) == FOLDS}


def arrays(answers: Answers, labels: dict[str, int]) -> tuple[list[str], Array, Array]:
    """PMIDs, truth (n,) and log-probabilities (n, labels), by seed and PMID."""
    keys = sorted(answers)
    pmids = [pmid for _, pmid in keys]
    return pmids, np.array([labels[pmid] for pmid in pmids]), np.array([answers[key] for key in keys])


def tables(rows: Array, truth: Array, given: Array) -> Array:
    """Counts (rows, truth, answer) of the answers (n,), each added to its row."""
    counts = np.zeros((rows.max() + 1, len(LABELS), len(LABELS)), dtype=np.int64)
    np.add.at(counts, (rows, truth, given), 1)
    return counts


def rounded(values: dict[str, Any]) -> dict[str, float]:
    """The figures with four decimals."""
    return {key: round(float(value), 4) for key, value in values.items()}


def decisions(truth: Array, given: Array) -> dict[str, float]:
    """Accuracy, macro-F1, recall of 'maybe' and its share of the answers; truth and answers (n,)."""
    counts = tables(np.zeros_like(truth), truth, given)[0]
    figures = {"accuracy": accuracy(counts), "macro_f1": macro_f1(counts), "maybe_recall": recall(counts)[MAYBE]}
    return rounded({**figures, "maybe_given": (given == MAYBE).mean()})


def measures(answers: Answers, labels: dict[str, int]) -> dict[str, float]:
    """`decisions`, and the mean negative log-likelihood among the three labels."""
    _, truth, logs = arrays(answers, labels)
    normalised = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)
    nll = -normalised[np.arange(len(truth)), truth].mean()
    return {**decisions(truth, logs.argmax(1)), **rounded({"nll": nll})}


def interval(pmids: list[str], truth: Array, left: Array, right: Array) -> dict[str, Any]:
    """Left minus right, answers (n,) each: accuracy and macro-F1 with bootstrap intervals over questions."""
    questions = sorted(set(pmids))
    rows = np.searchsorted(questions, pmids)
    # Counts per question, so that a draw is a matrix product.
    sides = [tables(rows, truth, given) for given in (left, right)]
    draws = np.random.default_rng(0).multinomial(len(questions), np.full(len(questions), 1 / len(questions)), DRAWS)
    found: dict[str, Any] = {"questions": len(questions), "answers": len(pmids)}
    for key, figure in (("accuracy", accuracy), ("macro_f1", macro_f1)):
        value = figure(sides[0].sum(0)) - figure(sides[1].sum(0))
        of_draws = [figure(np.einsum("dq,qij->dij", draws, counts)) for counts in sides]
        low, high = np.percentile(of_draws[0] - of_draws[1], [2.5, 97.5])
        found[key] = [round(float(x), 4) for x in (value, low, high)]
    return found


def compare(left: Answers, right: Answers, labels: dict[str, int]) -> dict[str, Any]:
    """`interval` on the answers that both have."""
    keys = left.keys() & right.keys()
    pmids, truth, a = arrays({key: left[key] for key in keys}, labels)
    _, _, b = arrays({key: right[key] for key in keys}, labels)
    return interval(pmids, truth, a.argmax(1), b.argmax(1))


def spread(records: list[Record], labels: dict[str, int]) -> dict[str, Any]:
    """Standard deviations of accuracy and macro-F1 over the trainings, and the figures of each whole seed."""
    of_fold = [measures(collect([record], "merged"), labels) for record in records]
    keys = ("accuracy", "macro_f1") if len(of_fold) > 1 else ()
    deviations = {f"{key}_sd_over_folds": np.std([fold[key] for fold in of_fold], ddof=1) for key in keys}
    seeds = {seed: measures(collect(found, "merged"), labels) for seed, found in whole_seeds(records).items()}
    return {"trainings": len(records), **rounded(deviations), "seeds": seeds}


def prior_correction(logs: Array, priors: Array) -> Array:
    """What to add to the log-probabilities so that their mean probabilities are `priors`; shape (labels,).

    Iterated, as one division by the mean (Zhao et al. 2021, https://arxiv.org/abs/2102.09690) does not get there.
    """
    offset = np.zeros(len(LABELS))
    for _ in range(50):
        shifted = logs + offset
        mean = np.exp(shifted - np.logaddexp.reduce(shifted, axis=1, keepdims=True)).mean(0)
        offset += np.log(priors) - np.log(mean)
    return offset


def threshold(truth: Array, logs: Array) -> Array:
    """The offset of 'maybe' alone that gives the best macro-F1 on these answers; shape (labels,)."""
    offsets = np.linspace(-2, 6, 81)[:, None] * np.eye(len(LABELS))[MAYBE]
    given = [(logs + offset).argmax(1) for offset in offsets]
    return max(zip(offsets, given, strict=True), key=lambda pair: macro_f1(tables(0 * truth, truth, pair[1])[0]))[0]


def maybe_study(records: list[Record], labels: dict[str, int]) -> dict[str, Any]:
    """Each correction is fitted on the held-out answers of the other folds, or of 50 of them, and used on this fold.

    50 is what the pipeline has for validation, with five or six 'maybe'.
    """
    rng = np.random.default_rng(0)
    answers = collect(records, "merged")
    pmids, truth, logs = arrays(answers, labels)
    names = [f"{kind}, {size} questions" for kind in ("prior correction", "threshold") for size in (400, 50)]
    found = {name: np.full(len(truth), -1) for name in names}
    for record in records:
        of_seed = np.array([seed == record["seed"] for seed, _ in sorted(answers)])
        inside = of_seed & np.array([pmid in record["merged"] for pmid in pmids])
        others = np.flatnonzero(of_seed & ~inside)
        # Of the training questions, which are many: 'maybe' is 11 % of them.
        priors = np.bincount(truth[others], minlength=len(LABELS)) / len(others)
        for size in (400, 50):
            fit = others if size == 400 else rng.choice(others, size, replace=False)
            corrections = prior_correction(logs[fit], priors), threshold(truth[fit], logs[fit])
            for kind, offset in zip(("prior correction", "threshold"), corrections, strict=True):
                found[f"{kind}, {size} questions"][inside] = (logs[inside] + offset).argmax(1)
    study: dict[str, Any] = {"none": measures(answers, labels)}
    for kind, given in found.items():
        study[kind] = {**decisions(truth, given), "minus_none": interval(pmids, truth, given, logs.argmax(1))}
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answers", type=Path, default=HERE / "smollm2_crossval.jsonl")
    parser.add_argument("--data", type=Path, default=Path("data/raw"), help="of PubMedQA's files (default data/raw)")
    parser.add_argument("--out", type=Path, default=HERE / "smollm2_crossval.json")
    given = parser.parse_args()
    files = given.data / "ori_pqal.json", given.data / "test_ground_truth.json"
    dataset = read_dataset(*files, *(file.name for file in files))
    kept = dataset.records.keys() - dataset.test
    labels = {pmid: LABELS.index(dataset.records[pmid].final_decision) for pmid in kept}
    trainings, base = read(given.answers)
    reference = {kind: collect(trainings[REFERENCE], kind) for kind in ("merged", "nf4")}
    every = [record for records in trainings.values() for record in records]
    configurations: dict[str, Any] = {}
    for config, records in trainings.items():
        row = spread(records, labels)
        row |= {kind: measures(collect(records, kind), labels) for kind in ("merged", "nf4")}
        if config != REFERENCE:
            row["minus_reference"] = compare(collect(records, "merged"), reference["merged"], labels)
            row["nf4_minus_reference"] = compare(collect(records, "nf4"), reference["nf4"], labels)
        configurations[config] = row
    pmids = [pmid for record in every for pmid in record["merged"]]
    sides = [np.array([record[kind][p] for record in every for p in record["merged"]]) for kind in ("nf4", "merged")]
    truth = np.array([labels[pmid] for pmid in pmids])
    table = {
        "trainings": len(every),
        "not_tried": NOT_TRIED,
        "questions": len(labels),
        "reference": REFERENCE,
        "configurations": configurations,
        "nf4_minus_merged": interval(pmids, truth, *(logs.argmax(1) for logs in sides)),
        "base": {protocol: measures(answers, labels) for protocol, answers in base.items()},
        "base_lm_eval_minus_chat": compare(base["lm_eval"], base["chat"], labels),
        "maybe": {  # of whole seeds: a correction is fitted on the other folds
            config: maybe_study([record for found in whole.values() for record in found], labels)
            for config, records in trainings.items()
            if (whole := whole_seeds(records))
        },
    }
    given.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{len(every)} trainings; not tried:", *NOT_TRIED, sep="\n  ")
    for config, row in configurations.items():
        print(config, row["trainings"], row["merged"], row.get("minus_reference"))


if __name__ == "__main__":
    main()
