"""Turn a table of questions (CSV, TSV or XLSX) into the two JSON files that the pipeline reads.

A row is one question: an identifier, the question, the abstract, the answer (yes, no or maybe) and the conclusion. The
test questions are drawn by answer; with --group, all questions of a group (a patient, a study) are in one split, and
`format` keeps them together when it draws validation questions.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.dataset import duplicates, read_dataset
from pipeline.core.errors import Fail
from pipeline.core.files import sha256
from pipeline.core.labels import LABELS
from pipeline.core.outputs import scratch, write_json
from pipeline.core.record import Record, parse_record
from pipeline.models.chat import first_line

# Excel writes all of them: "Unicode Text", "CSV UTF-8" with a byte-order mark, and "CSV".
ENCODINGS = ("utf-16", "utf-8-sig", "cp1252")
FOLDS = 20  # a fold of a twentieth of the questions, so that the share of test questions is right to 5 %


def read_table(path: Path, sheet: str) -> Any:
    """The table as a pandas DataFrame of strings; raises `Fail`."""
    import pandas as pd

    if not path.is_file():
        raise Fail(f"{path} does not exist; name a CSV, TSV or XLSX file")
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    try:
        if path.suffix.lower() in (".xlsx", ".xlsm"):
            return pd.read_excel(path, sheet_name=sheet or 0, **options).fillna("")
        for encoding in ENCODINGS:
            try:
                with path.open(encoding=encoding) as file:
                    header = file.readline()
                    named = header.startswith("sep=")  # a line for Excel, which does not show it
                    header = file.readline() if named else header
                separator = max("\t;,", key=header.count)
                options |= {"sep": separator, "encoding": encoding, "skip_blank_lines": False, "skiprows": int(named)}
                table = pd.read_csv(path, **options)
            except UnicodeError:
                continue
            if not isinstance(table.index, pd.RangeIndex):
                raise ValueError(f"rows have more fields than the first line: quote fields with a {separator!r}")
            return table.fillna("")
    except Exception as error:  # pandas and openpyxl raise many kinds
        raise Fail(f"{path} cannot be read as a table ({first_line(error)}); save it as CSV UTF-8 or XLSX") from None
    raise Fail(f"{path} is neither UTF-8 nor Windows-1252 text; save it as CSV UTF-8")


def choose_columns(table: Any, columns: dict[str, str], path: Path) -> Any:
    """The table with the columns that are used, under our names; raises `Fail` listing the missing ones."""

    def plain(name: Any) -> str:  # a heading in Excel can have line breaks
        return " ".join(str(name).split()).lower()

    wanted = {ours: plain(name) for ours, name in columns.items() if name}
    found = {plain(name): name for name in table.columns}
    if missing := {ours: columns[ours] for ours, name in wanted.items() if name not in found}:
        has = ", ".join(repr(" ".join(str(name).split())) for name in table.columns)
        raise Fail(
            f"{path} has no column {', '.join(map(repr, missing.values()))}; it has {has}: name yours with "
            + ", ".join(f"--{ours}" for ours in missing)
        )
    headings = [plain(name) for name in table.columns]
    if alike := sorted({name for name in wanted.values() if headings.count(name) > 1}):
        raise Fail(f"{path} has several columns {', '.join(map(repr, alike))}; rename all but one")
    named = [name for ours, name in wanted.items() if ours != "group"]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise Fail(f"{path}: column {', '.join(map(repr, twice))} is named for two contents; each needs its own")
    chosen = table[[found[name] for name in wanted.values()]].copy()
    chosen.columns = list(wanted)
    for name in chosen.columns:
        chosen[name] = chosen[name].str.strip()
    return chosen[(chosen != "").any(axis=1)]  # Excel files often end with empty rows


def problems(table: Any) -> list[str]:
    """What is wrong with the rows, with their numbers as Excel shows them and identifiers."""
    found: list[str] = []
    valid: dict[str, Record] = {}
    for number, row in table.to_dict("index").items():
        name = f"row {number + 2} ({row['id'] or 'no identifier'})"
        found += [f"{name}: {column} is empty" for column in table.columns if not row[column]]
        if row["answer"] and row["answer"].lower() not in LABELS:
            found.append(f"{name}: the answer must be yes, no or maybe")
        if record := parse_record(row["id"], as_record(row))[0]:
            valid[row["id"]] = record
    counts = table["id"].value_counts()
    found += [f"{name}: the identifier occurs {count} times" for name, count in counts.items() if name and count > 1]
    return found + duplicates(valid)


def as_record(row: dict[str, str]) -> dict[str, Any]:
    """A row in PubMedQA's schema; an abstract's paragraphs become its sections."""
    contexts = [part.strip() for part in row["abstract"].splitlines() if part.strip()]
    return {
        "QUESTION": row["question"],
        "CONTEXTS": contexts,
        "LABELS": [""] * len(contexts),
        "LONG_ANSWER": row["conclusion"],
        "final_decision": row["answer"].lower(),
        **({"group": row["group"]} if "group" in row else {}),
    }


def draw_test(table: Any, share: float, seed: int) -> set[str]:
    """Identifiers of the test questions: about `share` of all, stratified by answer, groups kept whole."""
    from sklearn.model_selection import StratifiedGroupKFold

    groups = table["group"] if "group" in table.columns else table["id"]
    folds = min(FOLDS, groups.nunique(), max(table["answer"].str.lower().value_counts(), default=0))
    if folds < 2:
        raise Fail("the table needs two groups of questions, and two questions with the same answer; add some")
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    drawn: set[str] = set()
    for _, inside in splitter.split(table, table["answer"].str.lower(), groups):
        if len(drawn) >= share * len(table):
            break
        drawn |= set(table["id"].iloc[inside])
    return drawn


def main(
    file: Annotated[Path, typer.Argument(help="The table; its first line names the columns.")],
    output: Annotated[Path, typer.Option(help="Directory for the two JSON files.")] = Path("my-questions"),
    id_column: Annotated[str, typer.Option("--id", help="Column of identifiers.")] = "id",
    question: Annotated[str, typer.Option(help="Column of questions.")] = "question",
    abstract: Annotated[str, typer.Option(help="Column of abstracts, without the conclusion.")] = "abstract",
    answer: Annotated[str, typer.Option(help="Column of answers: yes, no or maybe.")] = "answer",
    conclusion: Annotated[str, typer.Option(help="Column of conclusions.")] = "conclusion",
    group: Annotated[str, typer.Option(help="Column of groups, such as patients: each is in one split.")] = "",
    sheet: Annotated[str, typer.Option(help="Sheet of an XLSX file; default: the first.")] = "",
    test_share: Annotated[float, typer.Option(min=0.05, max=0.95, help="Share of test questions.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draw.")] = 1,
) -> None:
    """Write OUTPUT/records.json and OUTPUT/test_ground_truth.json, and print the section `download` for params.yaml."""
    columns = {"id": id_column, "question": question, "abstract": abstract, "answer": answer}
    table = choose_columns(read_table(file, sheet), {**columns, "conclusion": conclusion, "group": group}, file)
    if found := problems(table):
        for problem in found:
            typer.echo(problem, err=True)
        raise Fail(f"{file}: the lines above name all {len(found)} problems; correct the table, then import it again")
    test = draw_test(table, test_share, seed)
    rows: dict[str, dict[str, str]] = {row["id"]: row for row in table.to_dict("records")}
    truth = {name: row["answer"].lower() for name, row in rows.items() if name in test}
    with scratch(output / "import") as partial:
        write_json(partial / "records.json", {name: as_record(row) for name, row in rows.items()})
        write_json(partial / "test_ground_truth.json", truth)
        read_dataset(partial / "records.json", partial / "test_ground_truth.json", str(file), "the test questions")
        for path in partial.iterdir():
            path.replace(output / path.name)
    if (different := len({row["question"] for row in rows.values()})) < len(rows) / 2:
        typer.echo(f"warning: {different} different questions in {len(rows)} rows; check --question", err=True)
    if leaks := [name for name, row in rows.items() if row["conclusion"] in row["abstract"]]:
        typer.echo(
            f"warning: {len(leaks)} abstracts contain their conclusion, such as that of {leaks[0]}: the answer can be "
            "read there; remove it",
            err=True,
        )
    typer.echo(f"{output}: {len(rows)} questions, {len(test)} of them for the test. In params.yaml:\n")
    typer.echo(f"download:\n  source: files\n  location: {output}")
    for key, name in {"records": "records.json", "test_ground_truth": "test_ground_truth.json"}.items():
        typer.echo(f"  {key}:\n    name: {name}\n    sha256: {sha256(output / name)}")
