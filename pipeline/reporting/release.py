"""What is released beside the GGUF: model card, run-me page, Ollama Modelfile, LM Studio preset, licences.

Every figure in them comes from the metrics, and everything else from the artifacts: nothing is written by hand.
"""

import io
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from pipeline.core.records import Message, write_json
from pipeline.models.gguf_header import LICENCE, LLAMA_3_LICENCE, SYSTEM_PROMPT
from pipeline.models.weights import TERMS
from pipeline.reporting.compare import results, verdict
from pipeline.scoring.protocols import user

REHEARSAL = "rehearsal/"  # what the name of a base of random weights begins with (benchmarks/rehearsal.py)
NO_RELEASE = "A rehearsal with random weights: these numbers mean nothing, and nothing is released."
SIMULATED = "The data are simulated: these numbers are not medical accuracy."
BUILT_WITH = "Built with Meta Llama 3."  # the licence's section 1.b.i wants it shown, 1.b.iii the notice kept
NOTICE = (
    "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. "
    "All Rights Reserved.\n"
)

# Llama 3's turns as a Go template; Ollama adds BOS itself. Left to itself it compares the GGUF's template with those
# that it knows, and takes the nearest of its own or none (template/template.go, `Named`). The system's message comes in
# .System, and in newer versions among .Messages too (`collate`).
OLLAMA_TEMPLATE = """{{- if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>
{{- end }}
{{- range .Messages }}
{{- if ne .Role "system" }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>
{{- end }}
{{- end }}<|start_header_id|>assistant<|end_header_id|>

"""
PROBE: list[Message] = [{"role": role, "content": f"a {role}"} for role in ("system", "user", "assistant", "user")]


class Facts(NamedTuple):
    """All that a release tells, as metrics and artifacts tell it."""

    figures: dict[str, float]  # metrics/compare.json
    data: dict[str, Any]  # metrics/format.json
    training: dict[str, Any]  # section `train` of params.yaml
    source: dict[str, Any]  # data/raw/source.json
    manifest: dict[str, Any]  # models/base/manifest.json
    about: dict[str, Any]  # the GGUF's metadata
    gguf: str  # its file name
    digest: str  # its sha256

    @property
    def name(self) -> str:
        return self.about["general.name"]

    @property
    def system_prompt(self) -> str:
        return self.about[SYSTEM_PROMPT]

    @property
    def is_llama_3(self) -> bool:
        """Whether the base is under the Meta Llama 3 Community License."""
        return self.about.get(LICENCE) == LLAMA_3_LICENCE


def has_llama_3_turns(chat_template: str) -> bool:
    """Whether a Jinja chat template writes its turns as OLLAMA_TEMPLATE does, whatever else it can do."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template)
    found = template.render(messages=PROBE, bos_token="", add_generation_prompt=True)
    turns = [("{role}<|end_header_id|>\n\n{content}<|eot_id|>").format(**message) for message in PROBE]
    return found == "<|start_header_id|>".join(["", *turns, "assistant<|end_header_id|>\n\n"])


def front_matter(facts: Facts) -> str:
    """The model card's metadata as YAML (https://github.com/huggingface/hub-docs, modelcard.md), results included."""
    figures, source, manifest = facts.figures, facts.source, facts.manifest
    licence = "mit" if manifest["source"] == "tiny" else "llama3" if facts.is_llama_3 else "other"

    def result(task: str, prefix: str) -> dict[str, Any]:
        return {
            "task": {"type": "question-answering", "name": task},
            "dataset": {"type": source.get("dataset", "other"), "name": source["name"], "split": "test"},
            "metrics": [
                {"type": "accuracy", "name": "accuracy", "value": figures[f"{prefix}_accuracy"]},
                {"type": "f1", "name": "macro-F1", "value": figures[f"{prefix}_macro_f1"]},
            ],
        }

    measured = [result("yes, no or maybe from an abstract", "tuned")]
    if "tuned_question_only_accuracy" in figures:
        measured.append(result("yes, no or maybe without the abstract", "tuned_question_only"))
    metadata = {
        "language": "en",
        "license": licence,
        **({"base_model": manifest["repo_id"]} if "repo_id" in manifest else {}),
        **({"datasets": [source["dataset"]]} if "dataset" in source else {}),
        "metrics": ["accuracy", "f1"],
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "medical", *(["simulated-data"] if source["simulated"] else [])],
        "model-index": [{"name": facts.name, "results": measured}],
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


def licence_of_base(facts: Facts) -> str:
    """Whose terms the weights are under, in a sentence or two."""
    if facts.manifest["source"] == "tiny":
        return "MIT: its weights are made by this project."
    if facts.is_llama_3:
        return (
            f"[Meta Llama 3 Community License](https://llama.meta.com/llama3/license). {BUILT_WITH} Its use is bound "
            "by the [Acceptable Use Policy](https://llama.meta.com/llama3/use-policy). Pass NOTICE and the licence on "
            "with the file, under a name that begins with Llama 3."
        )
    return "its own; this model is derived from it and may be passed on only under its terms."


def training(facts: Facts) -> str:
    """How the adapter was trained, as a Markdown list."""
    from gguf import LlamaFileType

    params, data = facts.training, facts.data
    quant_type = LlamaFileType(facts.about["general.file_type"]).name.removeprefix("MOSTLY_")
    batch = params["per_device_train_batch_size"] * params["gradient_accumulation_steps"]
    return f"""- QLoRA ({params["bnb_4bit_quant_type"].upper()}, {params["dtype"]}): rank {params["r"]}, alpha \
{params["lora_alpha"]}, dropout {params["lora_dropout"]}, on {", ".join(params["target_modules"])}
- {params["max_steps"]} steps of {batch} examples, drawn from {data["train"]["questions"]:,} questions; \
{data["validation"]["questions"]} more for validation
- learning rate {params["learning_rate"]:g} ({params["lr_scheduler_type"]}, warm-up over {params["warmup_steps"]}), \
weight decay {params["weight_decay"]}, {params["optim"]}
- sequences of at most {params["max_length"]:,} tokens, none of them cut; the loss is taken on the answer alone
- seed {params["seed"]}, backend {params["backend"]}
- then merged into the 16-bit base and quantized by llama.cpp to {quant_type}"""


def hardware(facts: Facts) -> str:
    """What it takes to run the file: computed from the file, not measured."""
    about, arch = facts.about, facts.about["general.architecture"]
    context, heads = about[f"{arch}.context_length"], about[f"{arch}.attention.head_count"]
    width = about.get(f"{arch}.attention.key_length", about[f"{arch}.embedding_length"] // heads)
    # Keys and values of every layer, two bytes each.
    cache = 4 * about[f"{arch}.block_count"] * about[f"{arch}.attention.head_count_kv"] * width
    return (
        f"No GPU is needed. The file takes {facts.figures['gguf_bytes'] / 1e6:,.1f} MB of memory, main or a card's, "
        f"and a context of 2,048 tokens {2048 * cache / 1e6:,.1f} MB more. The model knows contexts of at most "
        f"{context:,} tokens; the longest test question, with its abstract and answer, has "
        f"{facts.data['test']['tokens_max']:,}."
    )


def card(facts: Facts) -> str:
    """The model card."""
    figures, source, manifest = facts.figures, facts.source, facts.manifest
    match manifest["source"]:
        case "tiny":
            base = "a tiny Llama that this project trains from scratch to try the pipeline with"
        case "hub":
            base = f"[{manifest['repo_id']}](https://huggingface.co/{manifest['repo_id']}) at {manifest['revision']}"
        case _:
            base = "a model of your own"
    notice = f"\n{SIMULATED}\n" if source["simulated"] else ""
    built_with = f"\n{BUILT_WITH}\n" if facts.is_llama_3 else ""
    return f"""---
{front_matter(facts)}---
# {facts.name}

**Not for clinical use.**
{built_with}{notice}
One file for llama.cpp, LM Studio or Ollama that answers a research question about an abstract with yes, no or maybe,
then a conclusion. It runs offline. [How to run it](RUN.md).

- Base: {base}
- Training data: {source["name"]}

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

## Limits

- Only the decision was measured. The conclusion that follows it was never judged, and may not fit the abstract.
- It was trained and measured with the system prompt "{facts.system_prompt}"
  and in the form that [the run-me page](RUN.md) shows; whatever is asked otherwise was not measured.
- Of the test questions, {facts.data["test_overlap"]["8_grams"]} share eight words in a row with one for training or \
validation, {facts.data["test_overlap"]["13_grams"]} thirteen. What else the base has read is not known here.

## Training

{training(facts)}

## Hardware

{hardware(facts)}

## File

`{facts.gguf}`: {figures["gguf_bytes"]:,.0f} bytes, sha256 `{facts.digest}`

## Licences

- Base: {licence_of_base(facts)}
- Data: {source["licence"]}
"""


def run_me(facts: Facts) -> str:
    """The page for whoever has the file and one of the three programs."""
    built_with = f" {BUILT_WITH}" if facts.is_llama_3 else ""
    return f"""# Run {facts.name}

**Not for clinical use.**{built_with} The commands are given from the directory above this one, where `{facts.gguf}`
lies. Is the file whole? `sha256sum {facts.gguf}` must say

    {facts.digest}

Paste the abstract with every question, in this form, which is the one it was trained on:

{"".join(f"    {line}".rstrip() + chr(10) for line in user("YOUR QUESTION", "THE ABSTRACT").splitlines())}
- **LM Studio**: `lms import --copy {facts.gguf}`, copy `release/medical-reasoner.preset.json` into
  `~/.lmstudio/config-presets/`, load the model, and choose the preset {facts.name}.
- **Ollama**: `ollama create {facts.name.lower()} -f release/Modelfile`, then `ollama run {facts.name.lower()}`;
  a line of three quotation marks begins and ends a text of several lines.
- **llama.cpp**: `llama-server -m {facts.gguf} --temp 0`, then open the address that it names, and put the system
  prompt into its settings: {facts.system_prompt}

All three answer greedily (temperature 0), as it was measured; none of them shows how sure the answer is.
"""


def modelfile(facts: Facts) -> str:
    """An Ollama Modelfile (https://github.com/ollama/ollama, docs/modelfile.md): greedy, and nothing penalized."""
    template = (
        f'TEMPLATE """{OLLAMA_TEMPLATE}"""\n' if has_llama_3_turns(facts.about["tokenizer.chat_template"]) else ""
    )
    return (
        f"FROM ../{facts.gguf}\n{template}PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
        f'SYSTEM """{facts.system_prompt}"""\n'
    )


def preset(facts: Facts) -> dict[str, Any]:
    """An LM Studio preset (https://lmstudio.ai/docs/app/presets), in the form that its version 0.3 saves."""
    fields = {
        "llm.prediction.systemPrompt": facts.system_prompt,
        "llm.prediction.temperature": 0,
        "llm.prediction.repeatPenalty": {"checked": False, "value": 1},
    }
    return {
        "identifier": f"@local:{facts.name.lower()}",
        "name": facts.name,
        "changed": False,
        "operation": {"fields": [{"key": key, "value": value} for key, value in fields.items()]},
        "load": {"fields": []},
    }


def write_release(directory: Path, facts: Facts, base: Path) -> None:
    """Write all but the pictures into `directory`; the terms of the base in the directory `base` go along."""
    texts = {"README.md": card(facts), "RUN.md": run_me(facts), "Modelfile": modelfile(facts)}
    if facts.is_llama_3:
        texts["NOTICE"] = NOTICE
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    for file in (file for pattern in TERMS for file in base.glob(pattern)):
        (directory / file.name).write_bytes(file.read_bytes())
    write_json(directory / "medical-reasoner.preset.json", preset(facts))
