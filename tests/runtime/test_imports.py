"""What the runtime brings in, and when: never torch, and nothing that a path does not use."""

from pathlib import Path

import pytest

from tests.support.files import write_small
from tests.support.processes import imported_by

TORCH = {"torch", "transformers", "jaxtyping"}
LIBRARIES = {"tokenizers", "huggingface_hub", "safetensors"}


def test_importing() -> None:
    assert not imported_by("import anymamba") & (TORCH | LIBRARIES | {"numpy"})
    script = (
        "import pkgutil, importlib, anymamba.runtime as runtime\n"
        "for module in pkgutil.walk_packages(runtime.__path__, 'anymamba.runtime.'):\n"
        "    importlib.import_module(module.name)"
    )
    assert not imported_by(script) & (TORCH | LIBRARIES)


@pytest.mark.parametrize("kind", ["auto", "f32", "bf16", "int4"])
def test_tokens_need_numpy_alone(tmp_path: Path, kind: str) -> None:
    script = (
        "import anymamba; engine = anymamba.load(sys.argv[1], sys.argv[2])\n"
        "state = engine.prefill(engine.state(), [1, 2, 3])\n"
        "engine.generate([4], 5, state=state, temperature=0.8, top_k=5, top_p=0.9)\n"
        "engine.generate_batch([[4], [5, 6]], 5); engine.score([1, 2]); engine.logits([1])\n"
        "state.save(sys.argv[1] + '/a.state'); engine.load_state(sys.argv[1] + '/a.state')"
    )
    loaded = imported_by(script, write_small(tmp_path), kind)
    assert not loaded & (TORCH | LIBRARIES)
    assert "numpy" in loaded


def test_text_needs_the_tokenizer_only() -> None:
    script = "import anymamba; print(anymamba.load().generate('ROMEO:', 5, stop=['x']).text)"
    assert imported_by(script) & (TORCH | LIBRARIES) == {"tokenizers"}


def test_the_first_token_does_not_wait_for_what_it_does_not_use() -> None:
    """Modules of numpy and of Python that take time to import, and have no part in it."""
    script = "import anymamba; anymamba.load().generate('ROMEO:', 1)"
    assert not imported_by(script) & {
        "asyncio",
        "unittest",
        "http",
        "ssl",
        "concurrent",
        "requests",
    }


TO_ENCODE = """
from anymamba.assets import bundled_model
from anymamba.runtime.tokenizer import TextCodec
from anymamba.checkpoint.tokenizer import read_tokenizer
codec = TextCodec(lambda: read_tokenizer(bundled_model()))
assert codec.exists and 'tokenizers' not in sys.modules
codec.encode('a', special=True)
"""


@pytest.mark.parametrize(
    ("script", "needed", "unneeded"),
    [
        (TO_ENCODE, {"tokenizers"}, {"numpy"}),
        ("import anymamba.runtime.generation.sampling", {"numpy"}, {"tokenizers", "numpy.random"}),
        ("import anymamba.runtime.chat.template", set(), {"numpy"}),
    ],
)
def test_parts(script: str, needed: set[str], unneeded: set[str]) -> None:
    loaded = imported_by(script)
    assert needed <= loaded
    assert not loaded & (unneeded | TORCH | {"jinja2"})
