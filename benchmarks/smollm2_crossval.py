"""Which recipe fine-tunes SmolLM2-135M-Instruct best: cross-validation over PubMedQA's 500 non-test questions.

    python -m benchmarks.smollm2_crossval --model models/smollm2 --minutes 20

Each job trains on four fifths of the questions as stage `train` does it with backend trl (NF4 base, loss on the
answer alone, AdamW, linear decay), and takes the log-probabilities of yes, no and maybe for the held-out fifth:
from the adapter folded into the 16-bit base, as `merge` does it, and from the 4-bit base with the adapter beside it.
Folds are stratified by label.

`smollm2_folds` has the plan and `smollm2_group` the training; `--check` compares it with TRL's.

--out gets a JSON object a line: configuration, seed, fold, and the log-probabilities by PMID. A second call with the
same file goes on where the first stopped. `benchmarks.smollm2_recipe` makes the table.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.smollm2_folds import FOLDS, HERE, SEEDS, Config, Job, plan, read_questions, split
from benchmarks.smollm2_group import Study, check
from pipeline.core.example import Example
from pipeline.core.question import Question


def run(
    study: Study,
    examples: list[Example],
    questions: list[Question],
    groups: list[list[Job]],
    out: Path,
    deadline: float,
) -> None:
    """Train what `out` does not have of the groups, as long as the last one's time fits before `deadline`."""

    def add(record: dict[str, Any]) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    done = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []
    if not any("base" in record for record in done):
        add({"base": study.base(questions)})
    finished = {Job(Config(**row["config"]), row["seed"], row["fold"]) for row in done if "config" in row}
    parts = {seed: split(examples, seed) for seed in SEEDS}
    per_epoch = 0.0
    for planned in groups:
        jobs = [job for job in planned if job not in finished]
        if not jobs or time.time() + 1.1 * per_epoch * jobs[0].config.epochs > deadline:
            continue
        begun = time.time()
        training = [[e for fold in range(FOLDS) if fold != job.fold for e in parts[job.seed][fold]] for job in jobs]
        factors, history = study.train(jobs, training)
        seconds = round(time.time() - begun, 1)  # of the whole group
        scaling = jobs[0].config.lora_alpha / jobs[0].config.r
        for number, job in enumerate(jobs):
            losses = [step[number].item() for step in history]
            figures = {
                "steps": len(losses),
                "seconds": [seconds],
                "first_loss": round(sum(losses[:10]) / 10, 4),
                "last_loss": round(sum(losses[-10:]) / 10, 4),
            }
            add({**asdict(job), **figures, **study.answers(factors, number, scaling, parts[job.seed][job.fold])})
        per_epoch = (time.time() - begun) / jobs[0].config.epochs
        print(f"{time.time() - begun:.0f} s, {len(history)} steps of {len(jobs)}:", jobs[0].config, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a transformers directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=Path("data/raw"), help="of PubMedQA's files (default data/raw)")
    parser.add_argument("--out", type=Path, default=HERE / "smollm2_crossval.jsonl", help="JSON lines, appended to")
    parser.add_argument("--minutes", type=float, default=20, help="after which no training is started (default 20)")
    parser.add_argument("--groups", default="", help="numbers of the plan's groups, comma-separated (default all)")
    parser.add_argument("--check", action="store_true", help="compare a group with TRL, and train nothing else")
    given = parser.parse_args()
    examples, questions = read_questions(given.data, given.model)
    if given.check:
        check(given.model, examples)
    else:
        planned = plan()
        groups = [planned[int(number)] for number in given.groups.split(",")] if given.groups else planned
        run(Study(given.model), examples, questions, groups, given.out, time.time() + 60 * given.minutes)


if __name__ == "__main__":
    main()
