"""PubMedQA's answers (Jin et al. 2019, https://arxiv.org/abs/1909.06146)."""

from typing import Literal

Label = Literal["yes", "no", "maybe"]
LABELS: tuple[Label, ...] = ("yes", "no", "maybe")  # the order of the tables' columns
