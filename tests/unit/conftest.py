"""What several unit tests read and none changes."""

import contextlib
from pathlib import Path

import pytest

from tests.tables import make_report, write_inputs


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `report` has run on made-up inputs. Do not change it."""
    directory = tmp_path_factory.mktemp("reported")
    with contextlib.chdir(directory):  # to its params.yaml
        write_inputs(directory)
        make_report(Path())
    return directory
