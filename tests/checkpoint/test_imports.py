"""What importing the package and opening a model does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.layouts import write_model

HEAVY = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize("pickled", [False, True])
def test_light(tmp_path, pickled):
    write_model(tmp_path, pickled=pickled)
    program = (
        "import sys\n"
        "from anymamba import checkpoint\n"
        "folder = checkpoint.resolve(sys.argv[1])\n"
        "opened = checkpoint.open_checkpoint(folder)\n"
        "checkpoint.expected_shapes(opened.config)\n"
        "opened.pickled or checkpoint.checkpoint_digest(opened)\n"
        "print(*sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "anymamba" in loaded
    assert not loaded & HEAVY
