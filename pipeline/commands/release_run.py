"""Release-run: the run in dvc.lock -> .dvc/release, a small remote in git, so that a fresh clone pulls with no network.

Git ignores the folder and only this command adds files to it, so that a run of many gigabytes never gets there.
"""

import subprocess
from pathlib import Path

import typer

from pipeline.commands.cli import require_clone
from pipeline.core.errors import Fail
from pipeline.core.outputs import writing

FOLDER = Path(".dvc/release")  # the url of the remote `release` in .dvc/config
LIMIT = 6_500_000  # bytes; every clone has them, and those of earlier runs too


def main() -> None:
    """Put the outputs in dvc.lock, and nothing else, into .dvc/release, and stage it for git."""
    require_clone()
    from dvc.repo import Repo

    with writing(FOLDER) as partial, Repo(config={"remote": {"release": {"url": str(partial.absolute())}}}) as repo:
        outs = [out for out in repo.index.outs if out.use_cache]
        # `dvc push` only warns about what it does not find.
        if absent := [str(out) for out in outs if not out.hash_info or out.changed_cache()]:
            raise Fail(f"{absent[0]} of dvc.lock is not in DVC's cache; run `dvc repro`, or on a clone `dvc pull`")
        total = sum(out.meta.size or 0 for out in outs if out.meta)
        if total > LIMIT:
            raise Fail(
                f"the run in dvc.lock has {total / 1e6:,.1f} MB, more than the limit of {LIMIT / 1e6:.1f} MB; give it "
                "a remote of its own: `dvc remote add --default NAME URL`, then `make push`"
            )
        repo.push(remote="release")
    subprocess.run(["git", "add", "--force", "--all", str(FOLDER)], check=True)
    typer.echo(f"{FOLDER} has the run in dvc.lock, {total / 1e6:.1f} MB, staged for git: commit both together.")
