"""Comment: what a branch does to the results, as Markdown for its pull request, from what git holds.

Parameters and metrics as `dvc params diff` and `dvc metrics diff` tell them, the figures that count with their paired
intervals, the gate's verdict, and pictures.
"""

import subprocess
import sys
from pathlib import Path

import typer

from pipeline.commands.gate import commit_of, figures_at, judge
from pipeline.core.records import read_json
from pipeline.core.stage import Fail, run

MARK = "<!-- medical-reasoner: report -->"  # the workflow finds the comment to update by its first line

NOTE = (
    "All pull requests are measured on the same test questions, so these figures guard against getting worse; to "
    "choose among changes, compare them on validation questions."
)

# Title, file, key, and how a figure of it is written.
ROWS = [
    ("accuracy", "compare", "tuned_accuracy", "{:.1%}"),
    ("macro-F1", "compare", "tuned_macro_f1", "{:.1%}"),
    ("recall of 'maybe'", "compare", "tuned_recall_maybe", "{:.1%}"),
    ("calibration error", "compare", "tuned_calibration_error", "{:.1%}"),
    ("accuracy of the untuned base", "compare", "base_accuracy", "{:.1%}"),
    ("training loss at the end", "train", "last_loss", "{:.4f}"),
    ("validation loss", "train", "validation_loss", "{:.4f}"),
    ("training: VRAM reserved at most, MiB", "train_resources", "peak_vram_reserved_mib", "{:,.0f}"),
    ("training: memory at most, MiB", "train_resources", "peak_rss_mib", "{:,.0f}"),
    ("size of the GGUF, bytes", "compare", "gguf_bytes", "{:,.0f}"),
]
INTERVALS = {"tuned_accuracy": "accuracy", "tuned_macro_f1": "macro_f1"}  # what `difference` has an interval of


def figures_table(revision: str, commit: str, found: dict[str, float] | None) -> str:
    """Markdown of ROWS: at the commit, here, and the paired difference where there is one."""
    lines = [f"| | {revision} | here | difference, points |", "| --- | --: | --: | --: |"]
    for title, name, key, form in ROWS:
        path = Path(f"metrics/{name}.json")
        values = [figures.get(key) for figures in (figures_at(commit, path), read_json(path))]
        cells = ["" if value is None else form.format(value) for value in values]
        measure, change = INTERVALS.get(key), ""
        if measure and found:
            value, low, high = (100 * found[f"{measure}{end}"] for end in ("", "_low", "_high"))
            change = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {' | '.join([title, *cells, change])} |")
    return "\n".join(lines)


def dvc_diff(kind: str, revision: str) -> str:
    """What `dvc params diff` or `dvc metrics diff` says of here against a revision, as a Markdown table."""
    command = [sys.executable, "-m", "dvc", kind, "diff", "--md", revision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Fail(f"`dvc {kind} diff {revision}` failed ({done.stderr.strip().splitlines()[-1]}); run it by itself")
    header, rule, *rows = done.stdout.strip().splitlines() or ["", ""]
    return "\n".join([header, rule, *sorted(rows)]) if rows else "None."


def markdown(revision: str, pictures: str) -> str:
    """The comment."""
    judgement, commit = judge(revision), commit_of(revision)
    note = NOTE
    if found := judgement.main:
        note = (
            f"Against {revision}, {found['gained']} answers became right and {found['lost']} wrong (McNemar's exact p "
            f"{found['mcnemar_p']:.2g}); {found['changed']} changed in all. {NOTE}"
        )
    return f"""{MARK}
## What this branch does to the results

**Gate:** {judgement.sentence}.

{figures_table(revision, commit, judgement.main)}

{note}

### Parameters that differ

{dvc_diff("params", revision)}

### Pictures

![Training loss]({pictures}/loss.svg)
![Gold against predicted labels]({pictures}/confusion.svg)

<details><summary>Every metric that differs</summary>

{dvc_diff("metrics", revision)}

</details>
"""


def main(revision: str, pictures: str = "metrics/pictures") -> None:
    """Print the comment on this directory's results against REVISION's; --pictures: where its images are."""
    typer.echo(markdown(revision, pictures), nl=False)


if __name__ == "__main__":
    run(main)
