"""A small model that all tests of the runtime may open, and one that is large."""

from pathlib import Path

import pytest

import anymamba
from tests.support.files import write_small


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def engine(folder: Path) -> anymamba.Engine:
    return anymamba.load(folder)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 50 MB, in tensors of 1 MB at most."""
    size = {"hidden_size": 256, "time_step_rank": 16, "num_hidden_layers": 32}
    written = write_small(tmp_path_factory.mktemp("large"), **size)
    assert (written / "model.safetensors").stat().st_size > 50e6
    return written
