"""Baseline: what the tuned model must beat, on the same questions.

The untuned base through the same converter, quantizer and scorer; the majority label of the training questions; and
TF-IDF over words and pairs of words with logistic regression, its C chosen by cross-validation on those questions.
"""

from pathlib import Path
from typing import Any

from pipeline.core.records import read_examples, write_json
from pipeline.core.stage import Usage, run, scratch
from pipeline.models.gguf import build
from pipeline.models.weights import load_directory, read_manifest
from pipeline.scoring.measures import summary
from pipeline.scoring.predict import Params, predict
from pipeline.scoring.protocols import INSTRUCTION, LABELS
from pipeline.stages import quantize


def text_baselines(train: list[Path], test: Path) -> dict[str, float]:
    """Accuracy and macro-F1 on `test` of the majority label and of TF-IDF + logistic regression, fitted on `train`."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    # In the order of their PMIDs: the folds, and so C, must not depend on what was drawn for validation.
    fitting = sorted((row for path in train for row in read_examples(path)), key=lambda row: row["pmid"])
    asked = read_examples(test)
    texts, questions = (
        [row["prompt"][-1]["content"].removesuffix(INSTRUCTION) for row in rows] for rows in (fitting, asked)
    )
    answers, gold = ([row["label"] for row in rows] for rows in (fitting, asked))
    folds = max(2, min(10, *(answers.count(label) for label in set(answers))))
    tfidf = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1000)
    )
    labels = list(LABELS)
    figures: dict[str, float] = {}
    for name, classifier in {
        "majority": DummyClassifier(strategy="most_frequent"),
        "tfidf": GridSearchCV(tfidf, {"logisticregression__C": [1, 10, 100]}, cv=folds),
    }.items():
        predicted = classifier.fit(texts, answers).predict(questions)
        figures[f"{name}_accuracy"] = round(float(accuracy_score(gold, predicted)), 6)
        scores: Any = f1_score(gold, predicted, labels=labels, average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
        figures[f"{name}_macro_f1"] = round(float(scores), 6)
    return figures


def main(
    base: Path, train: Path, validation: Path, test: Path, predictions: Path, metrics: Path, resources: Path
) -> None:
    """Write PREDICTIONS and METRICS of the untuned base as evaluate does, the text baselines' rows beside them."""
    usage = Usage()
    quant_type, params = quantize.Params.load("quantize").quant_type, Params.load("evaluate")
    text_rows = text_baselines([train, validation], test)
    manifest = read_manifest(base)
    directory = load_directory(base, manifest)
    with scratch(base.parent / "base.gguf") as gguf:
        build(directory, gguf, quant_type, quantize.metadata(manifest, {"name": "none"}, quant_type))
        speed = predict(gguf, test, params, predictions)
    write_json(metrics, {**summary(predictions), **text_rows})
    write_json(resources, {**usage.figures(), **speed})


if __name__ == "__main__":
    run(main)
