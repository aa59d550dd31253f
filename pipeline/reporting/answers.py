"""Written answers and the authors' conclusions -> ROUGE-L, and whether the answers are whole.

ROUGE-L is the F-measure of the longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013), as
Google's rouge-score computes it, without stemming. The decision in front of an answer does not count: LONG_ANSWER has
none.
"""

import re
from collections.abc import Sequence

import numpy as np

from pipeline.core.errors import Fail
from pipeline.core.facts import Conclusion
from pipeline.core.labels import LABELS
from pipeline.reporting.comparison import Answers, Written
from pipeline.scoring.answers import Answer
from pipeline.scoring.measures import Floats, Interval
from pipeline.sections.report import Report

DECISION = re.compile(rf"\W*(?:{'|'.join(LABELS)})(?![\w-])\W*", re.IGNORECASE)
SENTENCE_END = re.compile(r"""[.!?]["'\u2019\u201d)\]]*$""")  # closing quotes and brackets may follow


def without_decision(text: str) -> str:
    """The answer without the label that it begins with, if it begins with one."""
    return DECISION.sub("", text, count=1) if DECISION.match(text) else text


def mean(values: Floats, confidence: float) -> Interval:
    """The mean over questions with the interval of the central limit theorem (Miller 2024, arXiv 2411.00640).

    Of one question it has no width, as a bootstrap's.
    """
    from scipy.stats import norm

    value = float(values.mean())
    half = float(norm.ppf((1 + confidence) / 2)) * float(values.std(ddof=min(len(values) - 1, 1))) / len(values) ** 0.5
    return Interval(value=value, low=value - half, high=value + half)


def rouge_l(rows: Sequence[Answer], conclusions: dict[str, str]) -> Floats:
    """ROUGE-L of each answer, from 0 to 1, shape (questions,)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array(
        [scorer.score(conclusions[row.pmid], without_decision(row.text))["rougeL"].fmeasure for row in rows]
    )


def written(rows: Sequence[Answer], overlap: Floats, confidence: float) -> Written:
    """The figures of one model's answers."""
    return Written(
        rouge_l=mean(overlap, confidence),
        ended=sum(row.ended for row in rows) / len(rows),
        whole=sum(row.ended and bool(SENTENCE_END.search(row.text)) for row in rows) / len(rows),
        tokens=sum(row.tokens for row in rows) / len(rows),
    )


def measured_answers(rows: Sequence[Answer], conclusions: Sequence[Conclusion], params: Report) -> Answers | None:
    """The figures of both models' answers; None without answers. Raises `Fail` unless each question has one of each."""
    if not rows:
        return None
    gold = {row.pmid: row.long_answer for row in conclusions}
    tuned, base = (
        sorted((row for row in rows if row.model == model), key=lambda row: row.pmid) for model in ("tuned", "base")
    )
    if not [row.pmid for row in tuned] == [row.pmid for row in base] == sorted(gold):
        raise Fail(
            "data/answers.jsonl: not one answer of each model to each test question; run `dvc repro -f generate`"
        )
    of_tuned, of_base = rouge_l(tuned, gold), rouge_l(base, gold)
    return Answers(
        tuned=written(tuned, of_tuned, params.confidence),
        base=written(base, of_base, params.confidence),
        tuned_minus_base=mean(of_tuned - of_base, params.confidence),
    )
