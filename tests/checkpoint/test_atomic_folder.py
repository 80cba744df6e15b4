"""A destination is never the source."""

import os

import pytest

from anymamba.checkpoint.atomic_folder import check_apart
from anymamba.errors import ConfigError


def test_apart(tmp_path):
    (tmp_path / "model").mkdir()
    check_apart(tmp_path / "model", tmp_path / "other")
    check_apart(tmp_path / "model", tmp_path / "model" / "inside")
    for place in ("model", "model/../model", "."):
        with pytest.raises(ConfigError, match="would replace the source"):
            check_apart(tmp_path / "model", tmp_path / place)


def test_a_second_name_of_the_source(tmp_path):
    """As Model is of model on most Macs and on Windows; a hard link has two on all systems."""
    (tmp_path / "model.gguf").write_bytes(b"")
    os.link(tmp_path / "model.gguf", tmp_path / "Model.gguf")
    with pytest.raises(ConfigError, match="would replace the source"):
        check_apart(tmp_path / "model.gguf", tmp_path / "Model.gguf")
