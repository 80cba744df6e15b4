"""Names of all layouts become Transformers'."""

from __future__ import annotations

import pytest

from anymamba.checkpoint import to_transformers_name

from .by_hand import renamed, weights


@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
def test_every_layout(layout):
    stored = renamed(layout, weights())
    expected = {*weights(), *(["lm_head.weight"] if layout != "transformers" else [])}
    assert {to_transformers_name(name) for name in stored} == expected


def test_a_bare_backbone():
    for name in weights():
        assert to_transformers_name(name.removeprefix("backbone.")) == name


@pytest.mark.parametrize(
    "name", ["", "backbone.", "backbone.rope.inv_freq", "model.layers.0.D", "embeddingless.x"]
)
def test_unknown_names_stay(name):
    assert to_transformers_name(name) == name
