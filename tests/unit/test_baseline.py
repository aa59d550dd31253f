"""The rows that need no model: majority label and TF-IDF with logistic regression."""

from pathlib import Path

import pytest

from pipeline.core.records import write_jsonl
from pipeline.scoring.protocols import INSTRUCTION
from pipeline.stages.baseline import text_baselines

WORDS = {"yes": "strong clear effect", "no": "weak absent effect", "maybe": "open doubt effect"}


def write(path: Path, labels: dict[str, int], words: dict[str, str] = WORDS, first: int = 0) -> Path:
    decided = [label for label, count in labels.items() for _ in range(count)]
    write_jsonl(
        path,
        (
            {
                "pmid": str(first + i),
                "label": label,
                "prompt": [{"role": "user", "content": f"{words[label]}\n\n{INSTRUCTION}"}],
                "completion": [{"role": "assistant", "content": label}],
            }
            for i, label in enumerate(decided)
        ),
    )
    return path


def test_the_majority_row(tmp_path: Path):
    # Yes to everything on PubMedQA's test counts: F1 of yes is 2 x 276 / (500 + 276), the other two are 0.
    train = write(tmp_path / "train", {"yes": 20, "no": 12, "maybe": 4})
    test = write(tmp_path / "test", {"yes": 276, "no": 169, "maybe": 55})
    figures = text_baselines([train], test)
    assert figures["majority_accuracy"] == 0.552
    assert figures["majority_macro_f1"] == pytest.approx(552 / 776 / 3, abs=1e-6)


def test_the_majority_is_the_training_questions(tmp_path: Path):
    train = [write(tmp_path / "train", {"no": 11, "yes": 2}), write(tmp_path / "validation", {"maybe": 3}, first=50)]
    figures = text_baselines(train, write(tmp_path / "test", {"yes": 9, "no": 1}))
    assert figures["majority_accuracy"] == 0.1


def test_tfidf_learns_the_words(tmp_path: Path):
    train = write(tmp_path / "train", {"yes": 12, "no": 12, "maybe": 12})
    figures = text_baselines([train], write(tmp_path / "test", {"yes": 5, "no": 3, "maybe": 2}))
    assert (figures["tfidf_accuracy"], figures["tfidf_macro_f1"]) == (1.0, 1.0)


def test_the_draw_of_validation_changes_nothing(tmp_path: Path):
    labels, words = {"yes": 9, "no": 9, "maybe": 9}, dict.fromkeys(WORDS, "the same words") | {"no": "other words"}
    test = write(tmp_path / "test", {"yes": 5, "no": 3, "maybe": 2}, words)
    whole = write(tmp_path / "whole", labels, words).read_text().splitlines(keepends=True)
    results: list[dict[str, float]] = []
    for held_out in (range(0, 5), range(20, 26)):
        (tmp_path / "train").write_text("".join(line for i, line in enumerate(whole) if i not in held_out))
        (tmp_path / "validation").write_text("".join(whole[i] for i in held_out))
        results.append(text_baselines([tmp_path / "train", tmp_path / "validation"], test))
    assert results[0] == results[1]


@pytest.mark.filterwarnings("error:The least populated class")
def test_every_fold_holds_every_label(tmp_path: Path):
    train = write(tmp_path / "train", {"yes": 12, "no": 6, "maybe": 3})
    assert text_baselines([train], write(tmp_path / "test", {"yes": 3, "no": 1}))["majority_accuracy"] == 0.75


@pytest.mark.parametrize("labels", [{"yes": 9, "no": 4}, {"yes": 9, "no": 4, "maybe": 1}])
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_data_without_a_label_or_with_one_of_it(tmp_path: Path, labels: dict[str, int]):
    figures = text_baselines([write(tmp_path / "train", labels)], write(tmp_path / "test", {"yes": 3, "no": 1}))
    assert figures["majority_accuracy"] == 0.75
