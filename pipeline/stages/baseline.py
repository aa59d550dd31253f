"""Baseline: what the tuned model must beat, on the same questions.

The untuned base through the same converter, quantizer and scorer, credited with the protocol that is best on the
validation questions; the majority label of the training questions; and TF-IDF over words and word pairs with logistic
regression, its C chosen by cross-validation on those questions.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.core.example import Example
from pipeline.core.files import read_rows
from pipeline.core.labels import LABELS
from pipeline.core.outputs import scratch, write_json
from pipeline.core.params import load_params
from pipeline.core.question import Question
from pipeline.core.usage import Usage
from pipeline.models.base_weights import weights_directory
from pipeline.models.gguf import build
from pipeline.models.manifest import read_manifest
from pipeline.scoring.base_protocol import CANDIDATES, choose
from pipeline.scoring.measures import rounded, summary, wilson
from pipeline.scoring.predict import Settings, predict
from pipeline.scoring.predictions import read_predictions
from pipeline.scoring.protocols import abstract_of, evidence
from pipeline.sections.evaluate import Evaluate
from pipeline.sections.quantize import Quantize, texts


def words(row: Example | Question) -> str:
    """Abstract and question, as the text baselines read them."""
    return row.text if isinstance(row, Example) else evidence(row.question, abstract_of(row))


def text_decisions(fitting: Sequence[Example | Question], asked: Sequence[Question]) -> dict[str, list[str]]:
    """The labels that each text baseline, fitted on `fitting`, gives to the questions `asked`."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    # In the order of PMIDs: the folds, and so C, must not depend on what was drawn for validation.
    fitting = sorted(fitting, key=lambda row: row.pmid)
    texts, answers, questions = [words(row) for row in fitting], [row.label for row in fitting], list(map(words, asked))
    folds = max(2, min(10, *(answers.count(label) for label in set(answers))))
    tfidf = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1000)
    )
    classifiers = {
        "majority": DummyClassifier(strategy="most_frequent"),
        "tfidf": GridSearchCV(tfidf, {"logisticregression__C": [1, 10, 100]}, cv=folds),
    }
    return {name: list(found.fit(texts, answers).predict(questions)) for name, found in classifiers.items()}


def text_baselines(fitting: Sequence[Example | Question], asked: Sequence[Question]) -> dict[str, Any]:
    """Accuracy and macro-F1 on `asked` of the majority label and of TF-IDF + regression, fitted on `fitting`."""
    from sklearn.metrics import accuracy_score, f1_score

    gold, figures = [row.label for row in asked], dict[str, Any]()
    for name, decided in text_decisions(fitting, asked).items():
        right = round(float(accuracy_score(gold, decided, normalize=False)))
        macro_f1: Any = f1_score(gold, decided, labels=list(LABELS), average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
        figures[name] = {"accuracy": rounded(wilson(right, len(gold), 0.95)), "macro_f1": rounded(float(macro_f1))}
    return figures


def main(
    base: Path, train: Path, validation: Path, test: Path, predictions: Path, metrics: Path, resources: Path
) -> None:
    """Write PREDICTIONS and METRICS of the untuned base as evaluate does, and the text baselines' scores."""
    usage = Usage()
    params = load_params("evaluate", Evaluate)
    # Of the list of types only the first: dvc.yaml tracks no other, so that a type more runs nothing here again.
    quant_type = load_params("quantize", Quantize).quant_types[0]
    rows = read_rows(train, Example)
    tokens = texts(load_params("quantize", Quantize).imatrix_questions, rows)
    fitting = [*rows, *read_rows(validation, Question)]
    manifest, directory = read_manifest(base), weights_directory(base)
    settings = Settings("evaluate", params.protocols, params.n_ctx, params.max_new_tokens, params.cache_type)
    # One token of a written answer, because only the scored decisions are compared here.
    candidates = settings._replace(
        protocols=[name for name in CANDIDATES if name in params.protocols], max_new_tokens=1
    )
    with (
        ThreadPoolExecutor(1) as thread,
        scratch(base.parent / "base.gguf") as gguf,
        scratch(predictions.parent / "validation.csv") as chosen_by,
    ):
        baselines = thread.submit(text_baselines, fitting, read_rows(test, Question))  # while the converter runs
        build(directory, manifest, {gguf: quant_type}, {}, tokens)
        predict(gguf, validation, candidates, chosen_by)
        choice = choose(read_predictions(chosen_by), 0.95)
        speed = predict(gguf, test, settings, predictions)
    write_json(
        metrics, {**summary(read_predictions(predictions)), "base_protocol": rounded(choice), **baselines.result()}
    )
    write_json(resources, {**usage.figures(), **speed})
