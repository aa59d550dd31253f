"""What is released beside the GGUF: card, pages, Modelfile, preset, licences."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.models.gguf_header import SYSTEM_PROMPT
from pipeline.reporting.release import (
    NO_RELEASE,
    NOTICE,
    OLLAMA_TEMPLATE,
    SIMULATED,
    Facts,
    has_llama_3_turns,
    modelfile,
)
from pipeline.scoring.protocols import user
from pipeline.simulated.tokenizer import CHAT_TEMPLATE
from tests.tables import DATA, WEIGHTS, make_report, write_gguf, write_inputs

HUB = {"source": "hub", "repo_id": "meta-llama/Meta-Llama-3-8B-Instruct", "revision": "a" * 40, "files": [WEIGHTS]}
PUBMEDQA = {"simulated": False, "name": "PubMedQA PQA-L", "dataset": "qiaojin/PubMedQA", "licence": "MIT (data)"}
PICTURES = {f"{name}.png" for name in ("accuracy", "confusion", "reliability", "right_label", "risk_coverage")}
PAGES = {"README.md", "RUN.md", "Modelfile", "medical-reasoner.preset.json"}


class Made:
    """A project directory in which `report` has run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.release = directory / "release"
        with contextlib.chdir(directory):  # to its params.yaml
            self.figures = make_report(directory)
        self.digest = hashlib.sha256((directory / "medical-reasoner.gguf").read_bytes()).hexdigest()

    def names(self) -> set[str]:
        return {path.name for path in self.release.iterdir()}

    def page(self, name: str = "README.md") -> str:
        return (self.release / name).read_text(encoding="utf-8")

    def front(self) -> dict[str, Any]:
        """The card's metadata."""
        return YAML(typ="safe").load(self.page().split("---\n", 2)[1])

    def section(self, title: str) -> str:
        """A section of the card, its lines joined."""
        return " ".join(self.page().split(f"## {title}\n")[1].split("\n## ")[0].split())

    def preset(self) -> dict[str, Any]:
        return json.loads(self.page("medical-reasoner.preset.json"))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On the embedded base and simulated trials."""
    directory = tmp_path_factory.mktemp("simulated")
    write_inputs(directory)
    return Made(directory)


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On a Llama 3 from the hub and the real PubMedQA."""
    directory = tmp_path_factory.mktemp("llama_3")
    write_inputs(directory)
    (directory / "source.json").write_text(json.dumps(PUBMEDQA))
    (directory / "base" / "manifest.json").write_text(json.dumps(HUB))
    (directory / "base" / "LICENSE").write_text("META LLAMA 3 COMMUNITY LICENSE AGREEMENT")
    (directory / "base" / "USE_POLICY.md").write_text("Acceptable Use Policy")
    write_gguf(
        directory / "medical-reasoner.gguf",
        name="Llama-3-8B-medical-reasoner",
        licence="Meta Llama 3 Community License",
    )
    return Made(directory)


def test_what_is_released(simulated: Made) -> None:
    assert simulated.names() == PAGES | PICTURES
    for picture in re.findall(r"!\[.*\]\((.*)\)", simulated.page()):
        assert picture in PICTURES
    assert all((simulated.release / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)


def test_results_in_the_metadata_are_the_metrics(simulated: Made) -> None:
    with_abstract, without = simulated.front()["model-index"][0]["results"]
    for result, prefix in ((with_abstract, "tuned"), (without, "tuned_question_only")):
        found = {metric["type"]: metric["value"] for metric in result["metrics"]}
        assert found == {
            "accuracy": simulated.figures[f"{prefix}_accuracy"],
            "f1": simulated.figures[f"{prefix}_macro_f1"],
        }
        assert result["task"]["type"] == "question-answering"
        assert result["dataset"]["name"] == "made-up trials"
    assert simulated.front()["model-index"][0]["name"] == "medical-reasoner"
    assert (simulated.front()["license"], simulated.front()["tags"]) == ("mit", ["gguf", "medical", "simulated-data"])
    assert "base_model" not in simulated.front()


def test_the_hub_reads_the_metadata(llama_3: Made) -> None:
    from huggingface_hub import ModelCardData

    metadata = llama_3.front()
    index = metadata.pop("model-index")
    card = ModelCardData(**metadata, **{"model-index": index}, ignore_metadata_errors=False)
    assert [result.metric_value for result in card.eval_results or []][:1] == [llama_3.figures["tuned_accuracy"]]
    assert card.base_model == HUB["repo_id"]
    assert card.datasets == ["qiaojin/PubMedQA"]


def test_the_card_says_what_it_is_not_for_and_how_good_it_is(simulated: Made) -> None:
    text = simulated.page()
    assert "**Not for clinical use.**" in text
    assert "diagnosis or treatment" in simulated.section("Intended use")
    assert SIMULATED in simulated.section("Results")
    assert f"| tuned model | {simulated.figures['tuned_accuracy']:.1%} |" in text
    question_only = f"right on {simulated.figures['tuned_question_only_accuracy']:.1%} of the questions"
    assert f"{question_only} in place of {simulated.figures['tuned_accuracy']:.1%}: always paste" in simulated.section(
        "Results"
    )
    assert f"{simulated.figures['gguf_bytes']:,} bytes, sha256 `{simulated.digest}`" in simulated.section("File")
    assert "never judged" in simulated.section("Limits")
    assert f"{DATA['test_overlap']['8_grams']} share eight words" in simulated.section("Limits")


def test_the_card_tells_how_it_was_trained(simulated: Made) -> None:
    text = simulated.section("Training")
    for fact in (
        "NF4, float16",
        "rank 16, alpha 32, dropout 0.1, on q_proj, v_proj",
        "60 steps of 8 examples, drawn from 450 questions; 50 more for validation",
        "learning rate 0.0002 (linear, warm-up over 5), weight decay 0.01, adamw_8bit",
        "1,024 tokens",
        "seed 3407, backend trl",
        "by llama.cpp to Q4_K_M",
    ):
        assert fact in text


def test_the_card_tells_what_the_file_needs(simulated: Made) -> None:
    """Llama-3-8B's cache: 32 layers, 8 heads of 128 numbers, keys and values, 2 bytes: 128 KiB a token."""
    text = simulated.section("Hardware")
    assert f"{simulated.figures['gguf_bytes'] / 1e6:,.1f} MB of memory" in text
    assert f"a context of 2,048 tokens {2048 * 128 * 1024 / 1e6:,.1f} MB more" in text
    assert "at most 8,192 tokens" in text
    assert "has 777" in text


def test_a_llama_3_is_named_and_licensed_as_its_terms_want(llama_3: Made) -> None:
    assert llama_3.names() == PAGES | PICTURES | {"NOTICE", "LICENSE", "USE_POLICY.md"}
    assert llama_3.page("NOTICE") == NOTICE
    assert llama_3.page("LICENSE") == "META LLAMA 3 COMMUNITY LICENSE AGREEMENT"
    assert "simulated" not in llama_3.page().lower()
    assert llama_3.page().split("\n---\n")[1].startswith("# Llama-3-8B-medical-reasoner\n")
    assert llama_3.front()["model-index"][0]["name"].startswith("Llama-3")
    assert llama_3.preset()["name"].startswith("Llama-3")
    assert "ollama create llama-3" in llama_3.page("RUN.md")
    for name in ("README.md", "RUN.md"):
        assert "Built with Meta Llama 3" in llama_3.page(name).split("## ")[0]
    assert "Acceptable Use Policy" in llama_3.section("Licences")
    assert "MIT (data)" in llama_3.section("Licences")
    assert (llama_3.front()["license"], llama_3.front()["base_model"]) == ("llama3", HUB["repo_id"])


def test_nothing_is_said_of_llama_3_where_it_is_not_the_base(simulated: Made) -> None:
    assert not [name for name in PAGES if "Meta" in simulated.page(name)]


def test_the_modelfile(simulated: Made) -> None:
    text = simulated.page("Modelfile")
    assert text.startswith("FROM ../medical-reasoner.gguf\n")
    assert f'TEMPLATE """{OLLAMA_TEMPLATE}"""\n' in text
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n" in text
    assert text.endswith('SYSTEM """Be brief."""\n')


def test_the_preset(simulated: Made) -> None:
    preset = simulated.preset()
    fields = {field["key"]: field["value"] for field in preset["operation"]["fields"]}
    assert preset.keys() == {"identifier", "name", "changed", "operation", "load"}
    assert preset["identifier"] == "@local:medical-reasoner"
    assert fields["llm.prediction.systemPrompt"] == "Be brief."
    assert fields["llm.prediction.temperature"] == 0


def test_the_run_me_page_shows_the_form_of_the_training(simulated: Made) -> None:
    text = simulated.page("RUN.md")
    lines = [line.removeprefix("    ") for line in text.splitlines()]
    assert user("YOUR QUESTION", "THE ABSTRACT") in "\n".join(lines)
    assert simulated.digest in lines
    assert "Not for clinical use" in text
    for program in ("lms import --copy", "ollama create", "llama-server"):
        assert program in text


@pytest.mark.parametrize(
    ("template", "same"),
    [
        (CHAT_TEMPLATE, True),
        (CHAT_TEMPLATE.replace("{% for", "{# Llama 3's #}{% for"), True),
        (CHAT_TEMPLATE.replace("<|eot_id|>", "<|eot_id|>\n"), False),
        ("{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}", False),
    ],
)
def test_only_llama_3s_turns_get_llama_3s_go_template(template: str, same: bool) -> None:
    assert has_llama_3_turns(template) is same


def test_a_base_of_another_template_leaves_it_to_the_gguf(simulated: Made) -> None:
    about = {"tokenizer.chat_template": "{{ messages }}", SYSTEM_PROMPT: "Be brief."}
    facts = Facts(simulated.figures, {}, {}, {}, {}, about, "medical-reasoner.gguf", "")
    assert "TEMPLATE" not in modelfile(facts)


def test_a_rehearsal_releases_nothing(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "base" / "manifest.json").write_text(json.dumps({**HUB, "repo_id": "rehearsal/Llama-3"}))
    made = Made(tmp_path)
    assert made.names() == {"README.md"}
    assert made.page() == f"{NO_RELEASE}\n"
