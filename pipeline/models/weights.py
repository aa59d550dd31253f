"""Find or fetch a base's weights and check them: `python -m pipeline.models.weights BASE [--sizes]`.

Prints the directory with the weights; on an error, prints one sentence instead and exits with status 1.
`models.base_weights` runs this.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.errors import Fail, sentence
from pipeline.core.files import sha256
from pipeline.models.directory import TINY_BASE, refuse_code
from pipeline.models.hub import fetch
from pipeline.models.manifest import MANIFEST, TEMPLATE, Manifest, read_manifest


def locate(base: Path, manifest: Manifest) -> Path:
    """The directory with the weights, every file of the right size and beside the same configuration as `base`.

    Raises `Fail`.
    """
    match manifest.source:
        case "hub":
            directory = fetch(manifest.repo_id, manifest.revision, [file.name for file in manifest.files])
        case "local":
            directory = Path(manifest.path)
        case "tiny":
            directory = TINY_BASE
    for file in manifest.files:
        path = directory / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            what = "is missing" if size is None else f"has {size} bytes, expected {file.size}"
            raise Fail(f"{path} {what}; {remedy(path, manifest)}")
    for path in sorted(base.iterdir()):
        other = directory / path.name
        made_here = path.name == MANIFEST or (path.name == TEMPLATE and not other.is_file())
        if not made_here and (not other.is_file() or other.read_bytes() != path.read_bytes()):
            raise Fail(f"{other} differs from {path}; {remedy(other, manifest)}")
    refuse_code(directory, directory)
    return directory


def verify(directory: Path, manifest: Manifest) -> None:
    """Raise `Fail` naming the first weight file in `directory` whose sha256 is not the manifest's."""
    paths = [directory / file.name for file in manifest.files]
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        for file, path, found in zip(manifest.files, paths, threads.map(sha256, paths), strict=True):
            if found != file.sha256:
                raise Fail(f"{path} does not have the sha256 in {MANIFEST}; {remedy(path, manifest)}")


def remedy(path: Path, manifest: Manifest) -> str:
    """What to do about a file that is not what the manifest says."""
    match manifest.source:
        case "hub":  # a file of the hub's cache is a link: the file behind it has to go
            return f"remove {path.resolve()} and run `dvc repro`"
        case "local":
            return "if you want the new files, run `dvc repro -f -s base`, then `dvc repro`; else restore the old ones"
        case "tiny":
            return "run `git checkout pipeline/simulated/tiny_base`, then `dvc repro`"


def main(base: Path, sizes_only: bool) -> None:
    """Print the directory with the weights of the model in `base`, or a sentence."""
    try:
        manifest = read_manifest(base)
        directory = locate(base, manifest)
        if not sizes_only:
            verify(directory, manifest)
    except (Fail, OSError) as error:
        sys.stdout.write(f"{sentence(error) or error}\n")
        sys.exit(1)
    sys.stdout.write(f"{directory}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--sizes" in sys.argv)
