"""What is released beside the GGUF: the model card and an Ollama Modelfile, every figure in them from the metrics."""

import io
from typing import Any

from ruamel.yaml import YAML

from pipeline.compare import results, verdict

REHEARSAL = "rehearsal/"  # what the name of a base of random weights begins with (benchmarks/rehearsal.py)
NO_RELEASE = "A rehearsal with random weights: these numbers mean nothing, and nothing is released."
SIMULATED = "The data are simulated: these numbers are not medical accuracy."
LLAMA_3 = "Llama-3"  # in the name of a repository whose weights are under the Meta Llama 3 Community License


def is_llama_3(manifest: dict[str, Any]) -> bool:
    """Whether the base is under the Meta Llama 3 Community License."""
    return LLAMA_3 in manifest.get("repo_id", "")


def front_matter(figures: dict[str, float], source: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The model card's metadata as YAML (https://github.com/huggingface/hub-docs, modelcard.md), results included."""
    licence = "mit" if manifest["source"] == "tiny" else "llama3" if is_llama_3(manifest) else "other"
    result = {
        "task": {"type": "question-answering", "name": "yes, no or maybe from an abstract"},
        "dataset": {"type": source.get("dataset", "other"), "name": source["name"], "split": "test"},
        "metrics": [
            {"type": "accuracy", "name": "accuracy", "value": figures["tuned_accuracy"]},
            {"type": "f1", "name": "macro-F1", "value": figures["tuned_macro_f1"]},
        ],
    }
    metadata = {
        "language": "en",
        "license": licence,
        **({"base_model": manifest["repo_id"]} if "repo_id" in manifest else {}),
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "medical", *(["simulated-data"] if source["simulated"] else [])],
        "model-index": [{"name": "medical-reasoner", "results": [result]}],
    }
    text = io.StringIO()
    YAML().dump(metadata, text)  # pyright: ignore[reportUnknownMemberType]
    return text.getvalue()


def results_table(figures: dict[str, float]) -> str:
    """The rows of results as Markdown."""
    lines = [
        f"| {name} | {share:.1%} | {low:.1%} to {high:.1%} | {f1:.1%} |"
        for name, share, low, high, f1 in results(figures)
    ]
    return "\n".join(["| | accuracy | interval | macro-F1 |", "| --- | --- | --- | --- |", *lines])


def findings(figures: dict[str, float]) -> str:
    """What the figures say, in Markdown sentences: each difference, 'maybe', calibration, the other protocols."""
    lines = [verdict(figures, "tuned", "base")]
    if "tuned_lm_eval_accuracy" in figures:
        lines.append(
            f"The base's figure is the better of two ways of asking: {figures['base_chat_accuracy']:.1%} in its chat "
            f"template, {figures['base_lm_eval_accuracy']:.1%} as lm-evaluation-harness asks (the tuned model: "
            f"{figures['tuned_lm_eval_accuracy']:.1%})."
        )
    if "merged_accuracy" in figures:
        lines.append(
            f"{verdict(figures, 'tuned', 'merged')} Quantization changes "
            f"{figures['tuned_minus_merged_changed']:.0f} decisions; the mean KL divergence over the labels is "
            f"{figures['tuned_minus_merged_kl']:.2g} nats, and the most probable token is the same on "
            f"{figures['tuned_minus_merged_same_top_token']:.1%} of the questions."
        )
    lines.append(
        f"Of the questions whose answer is 'maybe', the tuned model finds {figures['tuned_recall_maybe']:.1%}, the "
        f"base {figures['base_recall_maybe']:.1%}. Left to write freely, the tuned model gives no decision on "
        f"{figures['tuned_unparsable_rate']:.1%} of the questions, the base on {figures['base_unparsable_rate']:.1%}."
    )
    lines.append(
        f"Its probabilities are off by {100 * figures['tuned_calibration_error']:.1f} points on average (expected "
        f"calibration error; base {100 * figures['base_calibration_error']:.1f}); Brier score "
        f"{figures['tuned_brier']:.3f} (base {figures['base_brier']:.3f})."
    )
    if "tuned_question_only_accuracy" in figures:
        lines.append(
            f"Asked without the abstract, the tuned model is right on {figures['tuned_question_only_accuracy']:.1%} of "
            f"the questions in place of {figures['tuned_accuracy']:.1%}: always paste the abstract."
        )
    lines.append(
        "The same test questions measure every change of this project, so a gain found by trying many changes on them "
        "is partly luck; choices are made on validation questions."
    )
    return "\n\n".join(lines)


def licence_of_base(manifest: dict[str, Any]) -> str:
    """Whose terms the weights are under, in a sentence or two."""
    if manifest["source"] == "tiny":
        return "MIT: its weights are made by this project."
    if is_llama_3(manifest):
        return "Meta Llama 3 Community License. Built with Meta Llama 3."
    return "its own; this model is derived from it and may be passed on only under its terms."


def card(figures: dict[str, float], source: dict[str, Any], manifest: dict[str, Any], name: str, digest: str) -> str:
    """The model card, for the GGUF called `name` with the sha256 `digest`."""
    match manifest["source"]:
        case "tiny":
            base = "a tiny Llama that this project trains from scratch to try the pipeline with"
        case "hub":
            base = f"[{manifest['repo_id']}](https://huggingface.co/{manifest['repo_id']}) at {manifest['revision']}"
        case _:
            base = "a model of your own"
    notice = f"\n{SIMULATED}\n" if source["simulated"] else ""
    return f"""---
{front_matter(figures, source, manifest)}---
# medical-reasoner

**Not for clinical use.**
{notice}
One file for llama.cpp, LM Studio or Ollama that answers a research question about an abstract with yes, no or maybe,
then a conclusion. It runs offline.

- Base: {base}
- Training data: {source["name"]}
- Training: QLoRA, then merged and quantized by llama.cpp

## Intended use

Research and teaching: how a small model is fine-tuned and measured. Paste the abstract before the question.
It is no medical device and was not tested in practice; it can be wrong and sound certain. Do not let it inform
the diagnosis or treatment of anyone.

## Results

On {figures["questions"]:.0f} test questions, none of them trained on. The answer is the likeliest of yes, no and maybe,
by log-probability; intervals are Wilson's, {figures["confidence"]:.0%}.
{notice}
{results_table(figures)}

{findings(figures)}

![Accuracy of the tuned model and of what it must beat](accuracy.png)

![Predicted labels against gold labels](confusion.png)

![How sure against how often right](reliability.png)

![Wrong answers among the surest ones](risk_coverage.png)

![Probability of the right label, base's against tuned's](right_label.png)

## File

`{name}`: {figures["gguf_bytes"]:,.0f} bytes, sha256 `{digest}`

## Licences

- Base: {licence_of_base(manifest)}
- Data: {source["licence"]}
"""


def modelfile(gguf: str, system_prompt: str) -> str:
    """An Ollama Modelfile (https://github.com/ollama/ollama, docs/modelfile.md); the chat template is in the GGUF."""
    return f'FROM {gguf}\nPARAMETER temperature 0\nSYSTEM """{system_prompt}"""\n'
