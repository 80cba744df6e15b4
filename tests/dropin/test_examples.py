"""The examples in the drop-in's docstrings run."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

from anymamba import dropin

MODULES = [found.name for found in pkgutil.walk_packages(dropin.__path__, "anymamba.dropin.")]
# One public function at least of each has an example of its own.
WITH_EXAMPLES = {
    "anymamba.dropin.causal_conv1d.causal_conv1d_interface",
    "anymamba.dropin.causal_conv1d.causal_conv1d_varlen",
    "anymamba.dropin.mamba_ssm.ops.selective_scan_interface",
    "anymamba.dropin.mamba_ssm.ops.triton.k_activations",
    "anymamba.dropin.mamba_ssm.ops.triton.layer_norm",
    "anymamba.dropin.mamba_ssm.ops.triton.layernorm_gated",
    "anymamba.dropin.mamba_ssm.ops.triton.selective_state_update",
    "anymamba.dropin.mamba_ssm.ops.triton.softplus",
    "anymamba.dropin.rows",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, tried = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert tried > 0 or name not in WITH_EXAMPLES


def test_no_module_is_missing() -> None:
    assert set(MODULES) >= WITH_EXAMPLES
