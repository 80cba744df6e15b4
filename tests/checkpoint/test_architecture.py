"""The table of tensors: what follows from it, and that no other list stands beside it."""

from pathlib import Path

import pytest

import anymamba
from anymamba.checkpoint import expected_shapes
from anymamba.checkpoint.architecture import MAMBA, role_of
from anymamba.checkpoint.gguf.names import from_gguf_name, to_gguf_name

PACKAGE = Path(anymamba.__file__).parent
CONFIG = {"num_hidden_layers": 2, "use_bias": True, "tie_word_embeddings": False}
# Who has the tensors as attributes: the specification, and the layers.
OWNERS = (
    *("minimal.py", "minimal_mamba2.py", "checkpoint/architecture.py", "layers/", "dropin/"),
    *("modeling/mamba/mixer", "modeling/mamba2/mixer"),
)


def test_every_tensor_has_a_role() -> None:
    roles = {role_of(name) for name in expected_shapes(CONFIG)}
    assert roles == {"large matrix", "small matrix", "convolution", "vector", "decay"}
    assert role_of("score.weight") is role_of("layers.0.mixer.in_proj") is None


@pytest.mark.parametrize("name", expected_shapes(CONFIG))
def test_gguf_names_lead_back(name: str) -> None:
    if name.endswith("_proj.bias") and "dt_proj" not in name:
        with pytest.raises(KeyError):
            to_gguf_name(name)
    else:
        assert from_gguf_name(to_gguf_name(name)) == name


def test_each_name_of_the_core_stands_once() -> None:
    names = [row.core for row in (*MAMBA.outside, *MAMBA.layer)]
    assert len(set(names)) == len(names)


def test_few_files_name_a_projection() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    others = [
        name
        for name, path in files.items()
        if not name.startswith(OWNERS) and "in_proj" in path.read_text(encoding="utf-8")
    ]
    # They compute with the matrices one by one, or name them to a user.
    assert len(others) <= 5, others
