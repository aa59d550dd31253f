"""`python -m pipeline browse`: every question with what each model answered, whatever its texts are."""

import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.commands import browse
from pipeline.core.errors import Fail
from pipeline.core.facts import Conclusion
from pipeline.core.files import read_rows
from pipeline.core.labels import LABELS
from pipeline.core.question import Question
from pipeline.core.rows import write_rows
from pipeline.scoring.answers import Answer
from pipeline.scoring.predictions import read_predictions, write_predictions
from tests.tables import ANSWERS, CONCLUSIONS, model, write_values

EVIL = '</script><script>document.title="run"</script><img src=x onerror=\'document.title="run"\'>&amp; {{ 7 * 7 }} \'"'


class Page(html.parser.HTMLParser):
    """The tags of a page, and the texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts = list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def run(reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of 500 questions: the texts of the first are an attack on the page."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reported, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data/formatted").mkdir(parents=True)
    texts = {row.pmid: f"trial {row.pmid}" for row in model(0.5, 1)} | {"1000": EVIL}
    questions = [
        Question(
            pmid=row.pmid,
            label=row.label,
            system_prompt="Be brief.",
            question=f"Does {texts[row.pmid]} help?",
            contexts=[f"Of {texts[row.pmid]}."],
            labels=["METHODS"],
        )
        for row in model(0.5, 1)
    ]
    write_rows(browse.TEST, questions)
    write_rows(browse.CONCLUSIONS, [Conclusion(pmid=row.pmid, long_answer=EVIL) for row in questions])
    answers = [row.model_copy(update={"text": f"Yes. {EVIL}"}) for row in read_rows(tmp_path / ANSWERS, Answer)]
    write_rows(browse.ANSWERS, answers)
    return tmp_path


def test_every_text_is_shown_as_it_is_and_none_becomes_a_tag_or_a_script(run: Path) -> None:
    browse.main()
    page = Page((run / "browse.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert (names.count("article"), names.count("script"), names.count("img"), names.count("link")) == (500, 1, 0, 0)
    for text in (f"Does {EVIL} help?", f"METHODS: Of {EVIL}."):
        assert page.texts.count(text) == 1
    assert (page.texts.count(EVIL), page.texts.count(f"Yes. {EVIL}")) == (500, 1000)
    loads = {"src", "href", "srcset", "action", "data", "poster", "on"}
    assert [attributes for _, attributes in page.tags if loads & attributes.keys()] == []
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert str(policy).startswith("default-src 'none'")  # a browser loads nothing, whatever the page says


def test_the_filters_are_those_of_the_predictions(run: Path) -> None:
    tuned, merged, base = (
        read_predictions(run / f"metrics/predictions/{name}.csv") for name in ("tuned", "merged", "base")
    )
    doubtful = tuned["chat"][7]._replace(log_probabilities=(-0.9, -0.91, -1.6), prediction="yes")
    tuned["chat"][7] = doubtful
    logs = [tuple(-3.0 if log < -1 else -0.2 for log in row.log_probabilities) for row in tuned["chat"]]
    sure = [row._replace(log_probabilities=log) for row, log in zip(tuned["chat"], logs, strict=True)]
    sure[7] = doubtful
    write_predictions(run / "metrics/predictions/tuned.csv", [*sure, *tuned["lm_eval"], *tuned["question_only"]])
    browse.main(run / "page.html")
    shown = [attributes for tag, attributes in Page((run / "page.html").read_text()).tags if tag == "article"]
    expected = zip(sure, merged["chat"], base["lm_eval"], strict=True)  # lm_eval is the base's better protocol
    for attributes, (row, at_16_bits, untuned) in zip(shown, expected, strict=True):
        passed = {
            "wrong": row.prediction != row.label,
            "unsure": row is doubtful,
            "tuning": row.prediction != untuned.prediction,
            "quantization": row.prediction != at_16_bits.prediction,
        }
        assert (attributes["data-label"], str(attributes["data-filters"]).split()) == (
            row.label,
            [name for name in passed if passed[name]],
        )


def test_without_a_16_bit_model_and_written_answers_it_shows_the_others(run: Path) -> None:
    write_predictions(Path("metrics/predictions/merged.csv"), [])
    browse.ANSWERS.write_bytes(b"")
    compared = json.loads((run / "metrics/compare.json").read_text())
    left = {name: value for name, value in compared.items() if name != "answers" and "merged" not in name}
    write_values(run, metrics__compare=left)
    browse.main()
    page = (run / "browse.html").read_text()
    assert "quantization" not in page
    assert "answer of the" not in page
    assert "ROUGE" not in page


def test_other_questions_than_those_that_were_answered_are_refused(run: Path) -> None:
    write_rows(browse.CONCLUSIONS, read_rows(run / CONCLUSIONS, Conclusion)[1:])
    with pytest.raises(Fail, match=r"predictions/base\.csv.*have different questions; run `dvc repro`"):
        browse.main()
    assert not (run / "browse.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_filters_label_and_search_hide_the_other_questions_and_no_text_runs(run: Path) -> None:
    browse.main()
    page = (run / "browse.html").read_text()
    clicks = """<script>const say = [];
    const act = (id, event, change) => { change(document.getElementById(id)); form.dispatchEvent(new Event("input"));
        say.push([...document.querySelectorAll("article:not([hidden])")].length); };
    const form = document.querySelector("form");
    act("wrong", "input", box => box.checked = true);
    act("label", "input", list => list.value = "maybe");
    act("search", "input", field => field.value = "TRIAL no-such");
    act("wrong", "input", box => box.checked = false);
    act("label", "input", list => list.value = "");
    act("search", "input", field => field.value = "1007 Trial");
    say.push(document.title); document.body.textContent = say.join();</script>"""
    (run / "clicked.html").write_text(page + clicks)
    browser = ["chromium", "--headless", "--no-sandbox", f"--user-data-dir={run / 'browser'}", "--dump-dom"]
    done = subprocess.run([*browser, (run / "clicked.html").as_uri()], capture_output=True, text=True, check=True)
    tuned = read_predictions(run / "metrics/predictions/tuned.csv")["chat"]
    wrong = [row.label for row in tuned if row.prediction != row.label]
    expected = [len(wrong), wrong.count(LABELS[2]), 0, 0, 0, 1, "medical-reasoner: test questions"]
    assert ",".join(map(str, expected)) in done.stdout
