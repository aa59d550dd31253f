"""The baselines that need no model: majority label, and TF-IDF with logistic regression."""

from typing import Any

import pytest

from pipeline.core.example import Example
from pipeline.core.question import Question
from pipeline.stages.baseline import text_baselines

WORDS = {"yes": "strong clear effect", "no": "weak absent effect", "maybe": "open doubt effect"}


def rows(model: Any, words: dict[str, str] = WORDS, **labels: int) -> list[Any]:
    decided = [label for label, count in labels.items() for _ in range(count)]
    text, other = "text", {"input_ids": [1, 2], "prompt_tokens": 1}
    if model is Question:
        text, other = "question", {"system_prompt": "", "contexts": ["a"], "labels": [""]}
    return [
        model.model_validate({"pmid": f"{i:03}", "label": label, text: words[label], **other})
        for i, label in enumerate(decided)
    ]


def test_the_majority_s_figures_are_those_published_for_pubmedqa():
    # Yes to everything on PubMedQA's test counts: F1 of yes is 2 x 276 / (500 + 276), the other two are 0.
    asked = rows(Question, yes=276, no=169, maybe=55)
    figures = text_baselines(rows(Example, yes=20, no=12, maybe=4), asked)["majority"]
    assert (figures["accuracy"]["value"], figures["macro_f1"]) == (0.552, pytest.approx(552 / 776 / 3, abs=1e-6))


def test_tfidf_learns_the_words():
    figures = text_baselines(rows(Example, yes=12, no=12, maybe=12), rows(Question, yes=5, no=3, maybe=2))["tfidf"]
    assert (figures["accuracy"]["value"], figures["macro_f1"]) == (1.0, 1.0)


def test_the_order_of_the_examples_and_so_the_draw_of_validation_changes_nothing():
    words = dict.fromkeys(WORDS, "the same words") | {"no": "other words"}
    fitting, asked = rows(Example, words, yes=9, no=9, maybe=9), rows(Question, words, yes=5, no=3, maybe=2)
    assert text_baselines(fitting[::-1], asked) == text_baselines(fitting[5:] + fitting[:5], asked)


@pytest.mark.parametrize("labels", [{"yes": 12, "no": 6, "maybe": 3}, {"yes": 9, "no": 4}])
@pytest.mark.filterwarnings("error:The least populated class")
def test_every_fold_has_every_label_that_there_is(labels: dict[str, int]):
    figures = text_baselines(rows(Example, **labels), rows(Question, yes=3, no=1))
    assert figures["majority"]["accuracy"]["value"] == 0.75
