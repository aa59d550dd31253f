"""`python -m pipeline COMMAND`: the commands around the pipeline. `dvc repro` runs the pipeline itself."""

import importlib
import os
import sys

from pipeline.run import ENVIRONMENT, use_venv

# Command -> module of pipeline.commands and what it does.
COMMANDS = {
    "plan": ("plan", "say what the parameters need in disk, memory and VRAM, before a download"),
    "ask": ("ask", "ask the GGUF a question about an abstract"),
    "serve": ("serve", "serve the GGUF to programs by OpenAI's protocol"),
    "publish": ("publish", "upload the GGUF and its model card to the Hugging Face hub"),
    "check-params": ("check_params", "check that params.yaml is valid and that a run can begin here"),
    "check-data": ("check_data", "list every problem of a question file"),
    "import-table": ("import_table", "turn a CSV, TSV or XLSX table into question files"),
    "summary": ("summary", "show the result of the last run"),
    "plots": ("plots", "draw every plot on a page that needs no network"),
    "browse": ("browse", "write a page of the test questions with every model's answers"),
    "sweep": ("sweep", "compare finished experiments: mean and spread over training seeds"),
    "lock": ("lock", "check that dvc.lock agrees with code, parameters and results"),
    "gate": ("gate", "fail if the tuned model is worse than the main branch's or its own base"),
    "comment": ("comment", "print what a pull request does to the results, as Markdown"),
    "release-run": ("release_run", "keep the run in dvc.lock in git, for `dvc pull` on a fresh clone"),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:13}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: python -m pipeline COMMAND [OPTIONS]; --help after a command shows its options", *lines])


def main(argv: list[str]) -> None:
    """Run the command that `argv` names."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(f"{usage()}\n")
        return
    if argv[0] not in COMMANDS:
        sys.exit(f"{argv[0]!r} is not a command\n{usage()}")
    use_venv()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        module = importlib.import_module(f"pipeline.commands.{COMMANDS[argv[0]][0]}")
        from pipeline.commands.cli import run_command
    except ModuleNotFoundError as error:
        sys.exit(
            f"{argv[0]}: {sys.executable} has no package {error.name}; run `make setup`, then `. .venv/bin/activate`"
        )

    run_command(argv[0], module.main, argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # while imports run; `run_command` has its own
        sys.exit(f"{sys.argv[1]}: interrupted; run the same command again")
