"""Names of all layouts become Transformers'."""

import pytest

from anymamba.checkpoint import to_transformers_name
from tests.support.layouts import renamed, weights


@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
def test_every_layout(layout):
    stored = renamed(layout, weights())
    expected = {*weights(), *(["lm_head.weight"] if layout != "transformers" else [])}
    assert {to_transformers_name(name) for name in stored} == expected


def test_a_bare_backbone():
    for name in weights():
        assert to_transformers_name(name.removeprefix("backbone.")) == name


@pytest.mark.parametrize(
    "wrapper", ["model.", "module.", "_orig_mod.", "base_model.model.", "module._orig_mod.model."]
)
@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
def test_wrappers_are_removed(layout, wrapper):
    for name in renamed(layout, weights()):
        assert to_transformers_name(wrapper + name) == to_transformers_name(name)


def test_a_compiled_layer_is_the_layer():
    name = "backbone.layers.0._orig_mod.mixer.D"
    assert to_transformers_name(name) == "backbone.layers.0.mixer.D"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "backbone.",
        "backbone.rope.inv_freq",
        "model.rope.inv_freq",
        "_orig_mod.head",
        "embeddingless.x",
    ],
)
def test_unknown_names_stay(name):
    assert to_transformers_name(name) == name
