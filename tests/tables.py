"""Tables of predictions made up for tests."""

import random
from pathlib import Path

from pipeline.measures import COLUMNS, Prediction
from pipeline.prompt import LABELS

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
