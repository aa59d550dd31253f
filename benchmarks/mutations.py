"""Break the code on purpose, one place at a time, and see the tests of two dozen promises fail.

`python -m benchmarks.mutations` copies the project, runs the tests below as they are, then once for every broken line.
A line is caught when a test fails by an assertion, or because the pipeline refuses what it has to accept; any other
error, such as a failing import, or a text that is not there exactly once, is an error of the table. `--only NAME` takes
a promise or several.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.record import HERE, record

ROOT = HERE.parent
LOG = HERE / "logs" / "mutations.log"

# A promise and why it matters; tests; then, as `module: text => what it becomes`, what each of these tests must notice.
# A module is one of pipeline/ unless it has a dot; ¶ ends a line.
TABLE = r"""
split: the test is the authors' list, never a re-split, and no question of it is trained on
    tests/unit/test_format.py::TestSplit
    format: "test": sorted(truth), => "test": rest[: len(truth)],
    format: rest = sorted(records.keys() - truth.keys()) => rest = sorted(records.keys())
    format: [pmid for pmid in rest if pmid not in validation] => rest
    tests/unit/test_format.py::test_duplicates_and_a_test_list_that_does_not_match
    tests/unit/test_format.py::TestArtificial
    format: if first != pmid: => if first is None:
    format: if both := sorted(records.keys() & extra.keys()): => if both := list[str]():
prompt: a prompt that holds its own answer measures nothing
    tests/unit/test_prompt.py::test_the_prompt_never_depends_on_an_answer
    tests/unit/test_prompt.py::test_no_protocol_depends_on_an_answer
    protocols: zip(record["LABELS"], record["CONTEXTS"], strict=True) => [("", str(record))]
    protocols: record["QUESTION"], None) => record["LONG_ANSWER"], None)
    protocols: {record['QUESTION']}\nAnswer:" => {record['QUESTION']}\nAnswer: {record['final_decision']}"
control: the name of a control token in an abstract is text, and ends no turn
    tests/unit/test_prompt.py::test_the_name_of_a_control_token_is_data
    tests/unit/test_format.py::test_every_text_of_a_record_is_data_and_nothing_else_changes
    protocols: f"{name[0][0]} {name[0][1:]}" => name[0]
    format: for field in ("QUESTION", "LONG_ANSWER")}¶    lists => for field in ("QUESTION",)}¶    lists
    format: for field in ("CONTEXTS", "LABELS")} => for field in ("CONTEXTS",)}
    tests/stages/test_ask.py::test_names_of_control_tokens_in_a_text_are_no_tokens
    ask: abstract and as_data(abstract, control) => abstract
    tests/unit/test_format.py::test_control_tokens_are_the_special_ones_and_those_that_llama_cpp_takes_for_such
    format: token["special"] or LOOKS_SPECIAL.fullmatch(token["content"]) => token["special"]
loss: a loss on the question would teach the question
    tests/stages/test_stages.py::test_the_loss_is_on_the_assistants_turn_alone
    train: report_to="none", => report_to="none", completion_only_loss=False,
    train: {"prompt": row["prompt"], "completion": row["completion"]} => {"messages": row["prompt"] + row["completion"]}
adapter: float16's loss scaling fails on a bfloat16 adapter, and a resumed run would differ
    tests/stages/test_stages.py::test_what_is_trained_is_the_adapter_in_float32
    train: parameter.data = parameter.data.float() => parameter.data = parameter.data.bfloat16()
    train: "target_modules": params.target_modules, => "target_modules": params.target_modules[1:],
resume: a killed training ends bit for bit as one that was not
    tests/stages/test_resume.py::test_a_killed_training_goes_on_and_ends_the_same
    train: set_seed(params.seed)  # before => print(params.seed)  # before
    train: str(checkpoint) if checkpoint else None => None
    tests/stages/test_resume.py::test_the_key_holds_all_that_determines_a_run
    tests/stages/test_resume.py::test_the_newest_checkpoint_is_taken
    tests/stages/test_resume.py::test_a_checkpoint_that_is_not_whole_is_passed_over_and_removed
    records: "params": params.model_dump(), => "params": sorted(params.model_dump()),
    train: == digests(path): => != {}:
    train: (len(path.name), path.name), reverse=True => path.name, reverse=True
merge: the merged weights are W + alpha / r B A, of the very base that the adapter was trained on
    tests/stages/test_stages.py::test_merge
    merge: scale = config["lora_alpha"] / config["r"] => scale = 1.0
    merge: weight.to(torch.float32, copy=True).addmm_(b, a, => weight.clone().addmm_(b.bfloat16(), a.bfloat16(),
    tests/stages/test_bad_input.py::test_an_adapter_for_another_base
    merge: identity.get("files") != manifest["files"] => not identity.get("files")
    tests/stages/test_bad_input.py::test_files[models/base/model.safetensors-alter-merge-does not have the sha256]
    merge: check_digest(directory / name, digest, manifest["files"]) => pass
    tests/unit/test_merge.py::test_an_adapter_of_which_one_weight_was_altered
    merge: sha256(path) != read_object(adapter / IDENTITY).get("adapter") => not sha256(path)
ids: the file that ships sees the token ids that were trained on
    tests/test_parity.py::TestTokenIds
    scorer: .prompt), self.forms => .prompt, True), self.forms
    scorer: messages=messages).prompt => messages=messages[1:]).prompt
    scorer: len(tokens), add_special, True) => len(tokens), add_special, False)
scores: a label's log-probability is the model's own, whatever was asked before
    tests/stages/test_stages.py::test_answers_of_several_tokens_equal_separate_evaluation
    scorer: first = self.log_probabilities(len(tokens) - 1) => first = self.log_probabilities(-1)
    scorer: index = len(tokens)¶        scores => index = len(tokens) - 1¶        scores
    scorer: for token in form[1:]: => for token in form[2:]:
    tests/test_parity.py::test_scores_do_not_depend_on_the_order_of_questions
    scorer: self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True) => pass
forms: 'Yes' is as much a yes as 'yes'
    tests/unit/test_scoring.py
    scorer: return [label, label.capitalize()] => return [label]
    scorer: return top + math.log(sum(math.exp(value - top) for value in values)) => return top
parser: an answer without a decision is unparsable, never a guess
    tests/unit/test_scoring.py
    scorer: found = re.match( => found = re.search(
    scorer: end = r"(?![\w-])" if finished => end = r"" if finished
    scorer: finished=True) or UNPARSABLE => finished=True) or "maybe"
measures: accuracy and macro-F1 are PubMedQA's own
    tests/unit/test_measures.py
    measures: return ratio(2 * right, => return ratio(right,
    measures: sum(row.greedy == UNPARSABLE => sum(row.greedy == "maybe"
noise: an interval that is too narrow makes noise look like progress
    tests/unit/test_measures.py
    tests/unit/test_compare.py
    measures: penalty / (4 * questions) => penalty / (2 * questions)
    compare: binomtest(only_first, changed) => binomtest(only_first, changed, alternative="less")
    compare: drawn.sum(axis=2) => drawn[::-1].sum(axis=2)
gate: a change that makes the model worse is refused
    tests/unit/test_gate.py
    gate: against_main["accuracy_high"] < 0 => against_main["accuracy"] < 0
    gate: if against_base["accuracy"] < 0: => if against_base["accuracy_high"] < 0:
    gate: base, tuned = headline(answers(BASE)), answers(TUNED)["chat"] => base = tuned = answers(TUNED)["chat"]
credit: the base, trained for no protocol, is credited with the better of two
    tests/unit/test_compare.py
    compare: return max(asked, key => return min(asked, key
    compare: HEADLINES = ("chat", "lm_eval") => HEADLINES = ("chat", "lm_eval", "question_only")
stages: what a stage reads and DVC does not know of leaves stale results behind
    tests/test_dvc_yaml.py
    dvc.yaml: - pipeline/stages/format.py¶    - pipeline/scoring/protocols.py => - pipeline/stages/format.py
    tests/test_repro.py::test_a_parameter_reaches_the_stages_that_read_it[evaluate.n_ctx]
    dvc.yaml: - evaluate¶    - quantize¶ => - quantize¶
whole: an output is there whole or not at all, and a killed evaluation goes on
    tests/unit/test_stage.py::TestWriting
    stage: finally:¶        remove(partial) => finally:¶        pass
    stage: .partial"¶    remove(partial) => .partial"
    tests/unit/test_stage.py::TestWriting::test_failure_leaves_the_old_output[file]
    stage: yield partial¶        if => try: yield partial¶        finally: shutil.copy(partial, path)¶        if
    tests/unit/test_predict.py
    predict: file.flush() => pass
    predict: raise¶        forget(path) => raise
    predict: if not rows:¶                forget(path) => forget(path)
    predict: (found, answer.pmid, answer.label) != (protocol, question["pmid"], question["label"]) or => not found or
    records: "inputs": [sha256(path) for path in inputs], => "inputs": len(inputs),
    tests/stages/test_resume.py::test_a_killed_evaluation_goes_on_and_ends_the_same
    predict: bar = tqdm(asked[resumed:], => bar = tqdm(asked[: len(asked) - resumed],
fetched: a file is what its sha256 says, and a lost connection is tried again, a bounded number of times
    tests/unit/test_download.py::test_faults_that_pass
    tests/unit/test_download.py::test_faults_that_stay
    download: if (found := sha256(path)) != file.sha256: => if not (found := sha256(path)):
    download: if expected and written != expected and => if not expected and
    download: for attempt in range(1, ATTEMPTS + 1): => for attempt in range(1, ATTEMPTS + 2):
headers: nothing but a whole file reaches native code
    tests/unit/test_header.py::test_cut_anywhere_it_is_refused
    tests/unit/test_header.py::test_an_altered_header_is_refused
    tests/unit/test_header.py::test_an_altered_entry_is_refused
    gguf_header: if size > len(self.data) - self.at: => if size > len(self.data):
    gguf_header: or offset != end: => or offset < 0:
    tests/unit/test_weights.py::test_verify
    tests/unit/test_weights.py::test_describe_refuses_what_is_no_whole_safetensors_file
    tests/unit/test_weights.py::test_describe
    weights: if found != next( => if not next(
    weights: raise Fail(f"{directory} holds no => print(f"{directory} holds no
    weights: with safe_open(path, "np"): => with path.open("rb"):
offline: no stage asks for anything outside the machine
    tests/stages/test_offline.py::test_a_run_in_a_network_namespace_of_its_own[download and format]
    download: params = load_params() => params = __import__("socket").getaddrinfo("::1", 9) and load_params()
code: nothing that a model's repository names is run
    tests/unit/test_weights.py::TestHub::test_a_model_that_names_code_of_its_own
    weights: if "auto_map" in read_object(file): => if "automap" in read_object(file):
    tests/stages/test_bad_input.py::test_code_that_a_tokenizer_names_is_never_run[quantize-models/merged]
    gguf: **{**options, "trust_remote_code": False} => **options
base: configuration and tokenizer are those of the commit, and a server's error is tried again
    tests/unit/test_weights.py::TestHub::test_a_small_file_that_is_not_the_hubs
    base: if not whole: => if whole is None:
    tests/unit/test_weights.py::TestHub::test_the_stage_that_needs_the_weights_fetches_and_checks_them
    weights: if not made_here and ( => if not made_here and not path.is_file() and (
    tests/unit/test_weights.py::TestHub::test_an_error_of_the_server_is_tried_again_and_then_named
    weights: if status < 500 and => if status < 600 and
alone: a stage dies with DVC, no second one runs beside it, and a cut dvc.lock has a way out
    tests/unit/test_stage.py::test_no_second_stage_runs_in_a_directory_under_dvc
    tests/unit/test_stage.py::test_a_copy_of_dvc_lock_is_kept_as_the_stage_found_it
    tests/unit/test_stage.py::test_a_stage_whose_dvc_was_killed_before_it_began_does_not_begin
    stage: fcntl.LOCK_EX | fcntl.LOCK_NB => fcntl.LOCK_SH | fcntl.LOCK_NB
    stage: shutil.copyfile(lock, partial) => partial.touch()
    __init__: if os.getsid(os.getppid()) != os.getsid(0): => if False:
    tests/test_dvc_yaml.py::test_a_stage_runs_the_module_of_its_name
    dvc.yaml: cmd: exec python3 -m pipeline.stages.train => cmd: python3 -m pipeline.stages.train
pull: a fresh clone has the model after `dvc pull`
    tests/test_remote.py::test_a_bare_pull_on_a_fresh_clone_brings_every_output
    .dvc/config: url = release => url = elsewhere
rehearsal: random weights are never released
    tests/unit/test_release.py::test_a_rehearsal_releases_nothing
    report: .startswith(REHEARSAL) => .endswith(REHEARSAL)
    report: if rehearsal: => if not rehearsal:
ask: a person gets the very probabilities that the metrics were computed from
    tests/stages/test_ask.py::test_a_test_question_gets_the_probabilities_of_the_metrics
    tests/stages/test_ask.py::test_the_command_shows_them
    ask: chat(system_prompt, question, abstract) => chat(system_prompt, question, abstract and f"{abstract} ")
    ask: total = log_sum_exp(list(scores.values())) => total = 0.0
"""


class Mutation(NamedTuple):
    """A text of a file that becomes another, and the tests of a promise that have to fail then."""

    promise: str
    tests: list[str]
    path: str
    old: str
    new: str


def module_path(name: str) -> str:
    """The file of the module `name` of pipeline/, by its path from the root."""
    (path,) = (ROOT / "pipeline").glob(f"{name}.py" if name == "__init__" else f"*/{name}.py")
    return str(path.relative_to(ROOT))


def table() -> list[Mutation]:
    """The rows of TABLE."""
    rows: list[Mutation] = []
    promise, tests = "", list[str]()
    for line in TABLE.strip().splitlines():
        if not line.startswith(" "):
            promise, tests = line.split(":")[0], []
        elif line.strip().startswith("tests/"):
            ended = bool(rows) and rows[-1].tests is tests  # the tests of what follows, not more of those above
            tests = [line.strip()] if ended else [*tests, line.strip()]
        else:
            name, change = line.strip().split(": ", 1)
            old, new = (text.replace("¶", "\n") for text in change.split(" => "))
            rows.append(Mutation(promise, tests, name if "." in name else module_path(name), old, new))
    return rows


def copy_project(directory: Path) -> None:
    """Copy what git would hold of the working tree, and commit it: some tests clone it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, directory / name)
    git(directory, "init", "--quiet")
    git(directory, "add", "--force", "--all")
    git(directory, "commit", "--quiet", "--message", "whole")
    (directory / ".venv").symlink_to(sys.prefix)


def git(directory: Path, *arguments: str) -> None:
    """Run git in `directory`, by a made-up author."""
    subprocess.run(
        ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments], cwd=directory, check=True
    )


def pytest(directory: Path, tests: list[str], base: str, **environment: str) -> tuple[int, str]:
    """The exit status of the tests, and the first line of the summary of those that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={directory}-{base}"]
    done = subprocess.run(
        [*command, *dict.fromkeys(tests)],
        cwd=directory,
        env=os.environ | {"COLUMNS": "1000", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0] if failed else done.stdout[-300:] + done.stderr[-300:]


def outcome(directory: Path, mutation: Mutation, **environment: str) -> tuple[str, str]:
    """`caught`, `survived` or `error`, and what pytest says of it."""
    path = directory / mutation.path
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1 or mutation.old == mutation.new:
        return "error", f"the text occurs {text.count(mutation.old)} times"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        git(directory, "commit", "--quiet", "--all", "--message", "broken")
        status, said = pytest(directory, mutation.tests, "one", **environment)
    finally:
        path.write_text(text, encoding="utf-8")
    if status == 0:
        return "survived", ""
    return (
        "caught"
        if status == 1 and re.search(r" - (assert|AssertionError|Failed|pipeline\.stage\.Fail)", said)
        else "error"
    ), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="promises of the table")
    only = parser.parse_args().only
    rows = [row for row in table() if not only or row.promise in only]
    counts = {"caught": 0, "survived": 0, "error": 0}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, "project")
        copy_project(directory)
        # This one is there for what it needs: a finished run, which the broken code need not make again.
        tests = ["tests/stages/test_stages.py::test_files_all_and_only", *(test for row in rows for test in row.tests)]
        status, said = pytest(directory, tests, "whole")
        if status:
            sys.exit(f"the tests fail before anything is broken: {said}")
        lines = [f"{len(set(tests))} tests pass on the code as it is ({time.perf_counter() - start:.0f} s)"]
        print(lines[0], flush=True)
        for row in rows:
            found, said = outcome(directory, row, MICRO=f"{directory}-whole/micro0")
            counts[found] += 1
            said = re.sub(r"^(FAILED|ERROR) tests/|" + re.escape(temporary), "", said)[:160]
            lines.append(f"{found:8}  {row.promise:10}  {row.path}: {row.old!r} => {row.new!r}  {said}")
            print(lines[-1], flush=True)
    promises = len({row.promise for row in rows})
    lines.append(f"{promises} promises, {len(rows)} broken lines: {counts} ({time.perf_counter() - start:.0f} s)")
    print(lines[-1])
    if not only and not counts["error"]:
        LOG.write_text("\n".join(lines) + "\n", encoding="utf-8")
        figures: dict[str, tuple[float, str]] = {
            "tests.mutations": (len(rows), ""),
            "tests.mutations_caught": (counts["caught"], ""),
        }
        record(figures, "python -m benchmarks.mutations", LOG)
    sys.exit(counts["caught"] < len(rows))


if __name__ == "__main__":
    main()
