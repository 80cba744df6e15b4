"""What importing the package and opening a model does not import."""

import pytest

from tests.support.layouts import write_model
from tests.support.processes import imported_by

HEAVY = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize("pickled", [False, True])
def test_light(tmp_path, pickled):
    write_model(tmp_path, pickled=pickled)
    program = (
        "from anymamba import checkpoint\n"
        "folder = checkpoint.resolve(sys.argv[1])\n"
        "opened = checkpoint.open_checkpoint(folder)\n"
        "checkpoint.expected_shapes(opened.config)\n"
        "opened.pickled or checkpoint.checkpoint_digest(opened)\n"
    )
    loaded = imported_by(program, tmp_path)
    assert "anymamba" in loaded
    assert not loaded & HEAVY
