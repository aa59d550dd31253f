"""What is released beside the GGUF: card, pages, Modelfile, preset, licences."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from pipeline.core.files import sha256
from pipeline.models.gguf_header import LLAMA_3_LICENCE
from pipeline.models.memory import small_load
from pipeline.reporting.comparison import NO_RELEASE, SIMULATED, points
from pipeline.reporting.release import has_llama_3_turns
from pipeline.scoring.measures import Interval
from pipeline.scoring.protocols import user
from pipeline.stages import report
from tests.conftest import output_of
from tests.tables import CHAT_TEMPLATE, DATA, SOURCE, WEIGHTS, make_report, write_gguf, write_inputs, write_values

HUB = {"source": "hub", "repo_id": "meta-llama/Meta-Llama-3-8B-Instruct", "revision": "a" * 40, "files": [WEIGHTS]}
PUBMEDQA = {**SOURCE, "simulated": False, "name": "PQA-L", "dataset": "qiaojin/PubMedQA", "licence": "MIT (data)"}
OWN_DATA = {**SOURCE, "simulated": False, "name": "own questions", "licence": ""}
PICTURES = {f"{name}.png" for name in ("accuracy", "confusion", "reliability", "right_label", "risk_coverage")}
PAGES = {"README.md", "RUN.md", "Modelfile", "medical-reasoner.preset.json", "SHA256SUMS", "system", "params"}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Made:
    """A project directory in which `report` has run."""

    def __init__(self, directory: Path, gguf: dict[str, Any] | None = None, **values: Any) -> None:
        self.directory, self.release = directory, directory / "release"
        with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:  # to its params.yaml
            if gguf or values:  # the pictures take most of the time, and `simulated` has them
                patch.setattr(report, "png", lambda _: b"")
                patch.setattr(report, "write_svgs", lambda *_: None)
            write_inputs(directory)
            write_values(directory, **values)
            if gguf:
                write_gguf(directory / "medical-reasoner.gguf", **gguf)
            if gguf and "licence" in gguf:
                (directory / "base" / "LICENSE").write_text("the licence")
                (directory / "base" / "USE_POLICY.md").write_text("the policy")
            self.figures = make_report(directory)

    def names(self) -> set[str]:
        return {path.name for path in self.release.iterdir()}

    def page(self, name: str = "README.md") -> str:
        return (self.release / name).read_text(encoding="utf-8")

    def card(self) -> ModelCardData:
        """The card's metadata as the hub reads it."""
        return ModelCard.load(self.release / "README.md").data

    def section(self, title: str) -> str:
        """A section of the card, its lines joined."""
        return " ".join(self.page().split(f"## {title}\n")[1].split("\n## ")[0].split())

    def turns(self) -> str | None:
        """The Go template in the Modelfile."""
        found = re.search(r'^TEMPLATE """(.*?)"""$', self.page("Modelfile"), re.DOTALL | re.MULTILINE)
        return found and found[1]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On the tiny base and simulated trials."""
    return Made(tmp_path_factory.mktemp("simulated"))


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On a Llama 3 from the hub and the real PubMedQA."""
    about = {"name": "Llama-3-8B-medical-reasoner", "licence": LLAMA_3_LICENCE}
    return Made(tmp_path_factory.mktemp("llama_3"), about, source=PUBMEDQA, base__manifest=HUB)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On the tiny base, a ChatML template and the user's own data."""
    return Made(tmp_path_factory.mktemp("own"), {"chat_template": CHATML}, source=OWN_DATA)


def test_the_release_holds_its_pages_and_every_picture_that_the_card_shows(simulated: Made) -> None:
    assert simulated.names() == PAGES | PICTURES | {"imatrix.gguf", "template"}
    assert set(re.findall(r"!\[.*\]\((.*)\)", simulated.page())) == PICTURES
    assert all((simulated.release / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)


def test_results_in_the_metadata_are_the_metrics(simulated: Made) -> None:
    tuned = simulated.figures["tuned"]
    found = {(r.dataset_config, r.metric_type): r.metric_value for r in simulated.card().eval_results or []}
    blind = tuned["protocols"]["question_only"]
    assert found == {
        ("chat", "accuracy"): tuned["accuracy"]["value"],
        ("chat", "f1"): tuned["macro_f1"],
        ("question_only", "accuracy"): blind["accuracy"]["value"],
        ("question_only", "f1"): blind["macro_f1"],
    }


def test_the_metadata_names_base_data_and_licence(simulated: Made, llama_3: Made, own: Made) -> None:
    cards = [made.card() for made in (simulated, llama_3, own)]
    assert [card.license for card in cards] == ["mit", "llama3", None]  # nothing of the user's own data is known
    assert [card.license_link for card in cards] == [None, "LICENSE", None]
    assert [card.base_model for card in cards] == [None, HUB["repo_id"], None]
    assert [card.to_dict().get("base_model_relation") for card in cards] == [None, "finetune", None]
    assert [card.language for card in cards] == ["en", "en", None]
    assert {(card.library_name, card.to_dict()["quantized_by"]) for card in cards} == {("gguf", "medical-reasoner")}
    assert [card.datasets for card in cards] == [None, ["qiaojin/PubMedQA"], None]
    assert ["simulated-data" in (card.tags or []) for card in cards] == [True, False, False]


def test_the_card_says_what_it_is_not_for_and_how_good_it_is(simulated: Made) -> None:
    tuned, text = simulated.figures["tuned"], simulated.page()
    assert "**Not for clinical use.**" in text
    assert "results by year of publication" in simulated.section("Data")
    assert "diagnosis or treatment" in simulated.section("Intended use")
    assert SIMULATED in simulated.section("Results")
    assert f"| tuned model | {tuned['accuracy']['value']:.1%} |" in text
    assert "| maybe | 55 |" in text
    assert f"difference {points(Interval(**simulated.figures['tuned_minus_base']['recall']['maybe']))} points)" in text
    assert "| year of publication | before 2005 | 180 |" in text
    assert "under the protocol lm_eval, chosen on 50 validation questions" in text
    for name in ("tuned", "base", "merged"):
        assert f"{simulated.figures[name]['outside_labels']:.1%}" in simulated.section("Results")
    assert f"{tuned['protocols']['question_only']['accuracy']['value']:.1%}" in simulated.section("Results")
    assert f"sha256 `{sha256(simulated.directory / 'medical-reasoner.gguf')}`" in simulated.section("File")
    assert f"{DATA['test_overlap']['8_grams']} share eight words" in simulated.section("Data")
    assert "| training | weights | 450 | 248 | 152 | 50 |" in simulated.section("Data")
    assert "`medical-reasoner-8B-Q4_K_M.gguf`" in simulated.section("File")


def test_the_cards_sections_are_in_the_order_of_tripod_llm(simulated: Made) -> None:
    titles = re.findall(r"^## (.*)$", simulated.page(), re.MULTILINE)
    assert titles[:6] == ["Intended use", "Data", "Training", "Evaluation", "Results", "Limits"]


def test_a_base_under_its_own_licence_is_linked(tmp_path: Path) -> None:
    card = Made(tmp_path, source=OWN_DATA, base__manifest={**HUB, "repo_id": "someone/base"}).card()
    assert (card.license, card.license_name) == ("other", "see-base-model")
    assert card.license_link == "https://huggingface.co/someone/base"


def test_the_card_says_how_it_was_trained_and_on_which_modules(simulated: Made) -> None:
    text = simulated.section("Training")
    for fact in (
        "NF4, float32",
        "rank 16",
        "on q_proj, v_proj -",
        "3 steps of 2 examples from 450",
        "Q4_K_M",
        "from 9 training",
    ):
        assert fact in text


def test_the_card_says_what_the_file_needs(simulated: Made) -> None:
    """Llama-3-8B's cache: 32 layers, 8 heads of 128 numbers, keys and values, 2 bytes: 128 KiB a token."""
    text = simulated.section("Hardware")
    for figure in (f"{2048 * 128 * 1024 / 1e6:,.1f} MB more", "at most 8,192 tokens", "has 777."):
        assert figure in text


def test_a_llama_3_is_named_and_licensed_as_its_terms_require(llama_3: Made) -> None:
    assert llama_3.names() == PAGES | PICTURES | {"imatrix.gguf", "template", "NOTICE", "LICENSE", "USE_POLICY.md"}
    assert "Meta Llama 3 Community License, Copyright © Meta Platforms, Inc." in llama_3.page("NOTICE")
    assert llama_3.page("LICENSE") == "the licence"
    assert "simulated" not in llama_3.page().lower()
    assert (llama_3.card().model_name or "").startswith("Llama-3")
    for name in ("README.md", "RUN.md"):
        assert "Built with Meta Llama 3." in llama_3.page(name).split("## ")[0]
    assert "Acceptable Use Policy" in llama_3.section("Licences")
    assert "MIT (data)" in llama_3.section("Licences")


def test_no_licence_is_claimed_that_is_not_this_projects(simulated: Made, own: Made) -> None:
    assert not [name for name in PAGES if "Meta" in simulated.page(name)]
    assert "states no licence" in own.section("Licences")


def test_ollama_and_lm_studio_generate_as_it_was_measured(simulated: Made) -> None:
    modelfile = simulated.page("Modelfile")
    assert modelfile.startswith("FROM ../medical-reasoner.gguf\n")
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n" in modelfile
    assert modelfile.endswith('SYSTEM """Be brief."""\n')
    preset = json.loads(simulated.page("medical-reasoner.preset.json"))
    assert json.loads(simulated.page("params")) == {"temperature": 0, "repeat_penalty": 1}
    assert simulated.page("system") == "Be brief."
    fields = {field["key"].rpartition(".")[2]: field["value"] for field in preset["operation"]["fields"]}
    assert fields == {"systemPrompt": "Be brief.", "temperature": 0, "repeatPenalty": {"checked": False, "value": 1}}


def test_only_llama_3s_turns_get_llama_3s_go_template(simulated: Made, own: Made) -> None:
    turns = simulated.turns()
    assert turns
    assert turns.startswith("{{- if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}")
    assert turns.endswith("{{- end }}<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert simulated.page("template") == turns  # of `ollama run hf.co/...`
    assert own.turns() is None
    assert own.names() == PAGES | PICTURES | {"imatrix.gguf"}
    assert has_llama_3_turns(CHAT_TEMPLATE.replace("{% for", "{# a comment #}{% for", 1))
    assert not has_llama_3_turns(CHAT_TEMPLATE.replace("<|eot_id|>", "<|eot_id|>\n"))


def test_the_checksums_are_of_every_file_and_are_checked_where_they_lie(simulated: Made) -> None:
    checked = output_of(simulated.release, "sha256sum -c SHA256SUMS")
    assert checked.count(": OK") == len(simulated.figures["files"]) > 1


def test_run_md_shows_the_form_of_the_training_and_copies_the_file(simulated: Made) -> None:
    text = simulated.page("RUN.md")
    lines = [line.removeprefix("    ") for line in text.splitlines()]
    assert user("YOUR QUESTION", "THE ABSTRACT") in "\n".join(lines)
    assert simulated.figures["gguf"]["sha256"] in lines
    assert SIMULATED in lines
    for words in ("Not for clinical use", "lms import --copy", "ollama create", "llama-server"):
        assert words in text


def test_run_md_loads_the_file_as_the_plan_computes_it_on_linux_and_windows(simulated: Made) -> None:
    lines = [line.removeprefix("    ") for line in simulated.page("RUN.md").splitlines()]
    load = small_load(2048)
    cache = load.cache_type
    settings = f"-ngl 99 -c 2048 -fa on -ctk {cache} -ctv {cache} -ub {load.n_ubatch}"
    for program in ("llama-server", "llama-server.exe"):
        assert f"{program} -m medical-reasoner.gguf --temp 0 {settings}" in lines
    variables = {"OLLAMA_FLASH_ATTENTION": 1, "OLLAMA_KV_CACHE_TYPE": cache, "OLLAMA_CONTEXT_LENGTH": 2048}
    assert " ".join([*(f"{name}={value}" for name, value in variables.items()), "ollama serve"]) in lines
    assert {f"setx {name} {value}" for name, value in variables.items()} <= {*lines}
    assert {"| Context Length | 2048 |", "| Flash Attention | on |", "| V Cache Quantization Type | Q8_0 |"} <= {*lines}


def test_a_rehearsal_releases_nothing(tmp_path: Path) -> None:
    made = Made(tmp_path, base__manifest={**HUB, "repo_id": "rehearsal/Llama-3"})
    assert made.names() == {"README.md"}
    assert made.page() == f"{NO_RELEASE}\n"
