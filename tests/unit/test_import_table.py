"""A table of questions becomes the two JSON files, or a list of everything that is wrong with it; and `check-data`."""

import importlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.commands.cli import run_command
from pipeline.core.files import sha256
from pipeline.simulated.trials import records
from tests.conftest import ROOT, output_of, yaml

HEADER = ["id", "question", "abstract", "answer", "conclusion"]
LINE = ",".join(HEADER) + "\n"


def rows(count: int = 30) -> list[list[str]]:
    """Questions with what separators, quotes and encodings stumble over."""
    return [
        [
            f"{i:03}",
            f"Is drug {i};\t“naïve”?",
            f"Aim {i}, µ\n\nEnd; {i}",
            ["yes", "no", "maybe"][i % 3],
            f'It "is", {i}.',
        ]
        for i in range(count)
    ]


def frame(found: list[list[str]], **columns: list[str]) -> Any:
    return pd.DataFrame(found, columns=pd.Index(HEADER)).assign(**columns)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: str, *arguments: str) -> str:
    """What the command says in refusing, or "" when it succeeds."""
    module = importlib.import_module(f"pipeline.commands.{command.replace('-', '_')}")
    try:
        run_command(command, module.main, list(arguments))
    except SystemExit as end:
        return str(end.code or "")
    return ""


def import_csv(table: Any, *options: str) -> str:
    table.to_csv("t.csv", index=False)
    return run("import-table", "t.csv", *options)


def written() -> list[dict[str, Any]]:
    """Records and test list."""
    return [json.loads(Path(f"my-questions/{name}.json").read_text()) for name in ("records", "test_ground_truth")]


def lacks(said: str, *words: str) -> list[str]:
    return [word for word in words if word not in said]


FORMS: dict[str, dict[str, Any]] = {
    "comma.csv": {},
    "bom.csv": {"encoding": "utf-8-sig"},
    "excel.csv": {"encoding": "cp1252"},
    "semicolon.csv": {"sep": ";"},
    "tab.tsv": {"sep": "\t"},
    "unicode.txt": {"sep": "\t", "encoding": "utf-16"},
    "named.csv": {"sep": ";"},
    "sheet.xlsx": {},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_row_arrives_as_it_was_written_and_passes_check_data(name: str, capsys: pytest.CaptureFixture[str]):
    table = frame([*rows(), *([""] * 5 for _ in range(9))])  # Excel's files often end with empty rows
    (table.to_excel if name == "sheet.xlsx" else table.to_csv)(name, index=False, **FORMS[name])
    if name == "named.csv":
        Path(name).write_text("sep=;\n" + Path(name).read_text())
    assert run("import-table", name) == ""
    values, truth = written()
    for pmid, question, abstract, decision, conclusion in rows():
        texts = {"QUESTION": question, "CONTEXTS": abstract.split("\n\n"), "LABELS": ["", ""]}
        assert values.pop(pmid) == texts | {"LONG_ANSWER": conclusion, "final_decision": decision}
        assert truth.get(pmid, decision) == decision
    assert (values, abs(len(truth) - 15) <= 2) == ({}, True)
    section = yaml.load(capsys.readouterr().out.partition("\n\n")[2])["download"]
    assert section["test_ground_truth"]["sha256"] == sha256(Path("my-questions/test_ground_truth.json"))
    assert run("check-data", "my-questions/records.json") == ""


def test_columns_are_named_by_options_and_others_are_left_out():
    names = ["Patient No", "Frage\nder Klinik", "Text", "Urteil", "Schluss"]
    table = frame(rows()).set_axis(names, axis=1).assign(other="x")
    assert not lacks(
        import_csv(table),
        "t.csv has no column 'id', 'question'",
        "it has 'Patient No', 'Frage der Klinik'",
        "--id, --question",
    )
    assert (
        import_csv(
            table, *(f"--{ours}={' '.join(name.lower().split())}" for ours, name in zip(HEADER, names, strict=True))
        )
        == ""
    )


def test_a_column_for_two_contents_or_two_for_one_is_refused_and_a_conclusion_in_its_abstract_is_reported(
    capsys: pytest.CaptureFixture[str],
):
    found = rows()
    assert "column 'answer' is named for two contents" in import_csv(frame(found), "--conclusion=Answer")
    assert "several columns 'answer'; rename" in import_csv(frame(found, Answer=["no"] * len(found)))
    assert import_csv(frame(found)) == ""
    assert "warning" not in capsys.readouterr().err
    found[3][2] += f"\n{found[3][4]}"
    assert import_csv(frame(found)) == ""
    assert "warning: 1 abstracts contain their conclusion, such as that of 003" in capsys.readouterr().err


def test_a_column_with_few_different_questions_is_reported(capsys: pytest.CaptureFixture[str]):
    wards = [f"Ward {i % 14}" for i in range(30)]
    assert import_csv(frame(rows(), question=wards)) == ""
    assert "warning: 14 different questions in 30 rows; check --question" in capsys.readouterr().err
    assert import_csv(frame(rows(), question=[f"Ward {i % 15}" for i in range(30)])) == ""
    assert "warning" not in capsys.readouterr().err


def test_all_problems_are_listed_with_the_row_that_excel_shows_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
):
    found = rows()
    found[3][0] = found[4][0]
    found[5][3], found[6][1], found[7][0], found[9][1:3] = "perhaps", " ", "", found[8][1:3]
    assert "t.csv: the lines above name all 5 problems" in import_csv(frame([*found[:4], [""] * 5, *found[4:]]))
    assert capsys.readouterr().err.splitlines() == [
        "row 8 (005): the answer must be yes, no or maybe",
        "row 9 (006): question is empty",
        "row 10 (no identifier): id is empty",
        "004: the identifier occurs 2 times",
        "009: duplicate of 008, the same question and abstract",
    ]
    assert not Path("my-questions").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (f"{LINE}1,q,a,yes,c,x\n2,q,a,no,c,x\n", "rows have more fields than the first line"),
        (f"{LINE}1,q,a,yes,c\n2,q, a, b,no,c\n", "cannot be read as a table"),
        (f"{LINE}1,q,a,yes\n", "name all 1 problems"),
        (LINE, "needs two groups"),
        (f"{LINE}1,q,a,yes,c\n", "needs two groups"),
        ("", "cannot be read as a table"),
        ("\x81\x8d", "neither UTF-8 nor Windows-1252"),
    ],
    ids=["longer", "ragged", "shorter", "header", "one row", "empty", "binary"],
)
def test_what_is_no_table_of_questions_is_refused_in_one_sentence(body: str, words: str):
    Path("t.csv").write_bytes(body.encode("latin-1"))
    assert words in run("import-table", "t.csv")


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("count", [4, 7, 12, 61])
def test_small_and_uneven_tables_are_divided_or_refused_in_one_sentence(count: int):
    said = import_csv(frame([[*row[:3], "yes" if i % 4 else "no", row[4]] for i, row in enumerate(rows(count))]))
    assert said == "" or "training question" in said


def test_a_group_is_in_one_split_and_the_seed_draws_it():
    groups = [f"patient {i // 4}" for i in range(60)]
    drawn: list[set[str]] = []
    for seed in (1, 1, 2):
        assert import_csv(frame(rows(60), p=groups), "--group=p", f"--seed={seed}", "--test-share=0.3") == ""
        drawn.append(set(written()[1]))
        outside = {groups[i] for i in range(60) if f"{i:03}" not in drawn[-1]}
        assert not outside & {groups[int(pmid)] for pmid in drawn[-1]}
        assert {pmid: row["group"] for pmid, row in written()[0].items()} == {f"{i:03}": groups[i] for i in range(60)}
        assert abs(len(drawn[-1]) - 18) <= 4
    assert drawn[0] == drawn[1] != drawn[2]
    assert "two groups" in import_csv(frame(rows(), p=["one"] * 30), "--group=p")


def test_what_else_is_in_the_output_directory_stays():
    assert import_csv(frame(rows()), "--output=.") == ""
    assert {path.name for path in Path().iterdir()} == {"t.csv", "records.json", "test_ground_truth.json"}


RECORDS, TRUTH = records(1, 40, 40)
FIRST, SECOND, THIRD, *_ = sorted(RECORDS.keys() - TRUTH.keys())
YES = {pmid: {**row, "final_decision": "yes"} for pmid, row in RECORDS.items() if pmid not in TRUTH}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ("\ufeff" + json.dumps(RECORDS), []),
        (
            json.dumps(RECORDS | {FIRST: {**RECORDS[FIRST], "QUESTION": ""}, SECOND: RECORDS[THIRD], "9": 1}),
            ["mine.json: 3 problems", f"{FIRST}: QUESTION", f"{THIRD}: duplicate of {SECOND}", "9: record"],
        ),
        (json.dumps(RECORDS)[:-1] + ', "7": {}, "7": {}}', ["mine.json: not valid JSON (duplicate keys '7')"]),
        (json.dumps(RECORDS | YES), ["no training question is answered 'no'", "answered 'maybe'", "at least two"]),
        ("", ["mine.json, line 1: not valid JSON"]),
    ],
    ids=["byte-order mark", "problems", "keys twice", "classes", "empty"],
)
def test_check_data_lists_every_problem_under_the_users_names(records: str, words: list[str]):
    Path("mine.json").write_text(records, encoding="utf-8")
    assert "test_ground_truth.json is no file" in run("check-data", "mine.json")
    Path("test_ground_truth.json").write_text(json.dumps(TRUTH))
    said = run("check-data", "mine.json")
    assert (lacks(said, *words), said != "") == ([], bool(words))


@pytest.mark.parametrize("convert", ["true", "input"])
def test_a_clone_has_the_committed_bytes_whatever_git_converts(convert: str):
    names = ["setup/install.sh", "pipeline/simulated/wordings.yaml"]
    names += [f"pipeline/simulated/tiny_base/{path.name}" for path in (ROOT / "pipeline/simulated/tiny_base").iterdir()]
    for name in [*names, ".gitattributes"]:
        (Path("source") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("source") / name).write_bytes((ROOT / name).read_bytes())
    commit = "git init -q && git add . && git -c user.name=x -c user.email=x@x commit -qm x"
    output_of(Path("source"), f"{commit} && git clone -q -c core.autocrlf={convert} -c core.eol=crlf . ../clone")
    assert {name: sha256(Path("clone") / name) for name in names} == {name: sha256(ROOT / name) for name in names}
