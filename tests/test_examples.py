"""The examples in all docstrings of the package run."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

import anymamba
from anymamba.originals import PACKAGES

NAMES = [found.name for found in pkgutil.walk_packages(anymamba.__path__, "anymamba.")]
# What has examples of its own public names, besides all modules of `checkpoint`.
WITH_EXAMPLES = {
    "dropin.causal_conv1d.causal_conv1d_interface",
    "dropin.causal_conv1d.causal_conv1d_varlen",
    "dropin.mamba_ssm.modules.ssd_minimal",
    "dropin.mamba_ssm.ops.selective_scan_interface",
    "dropin.mamba_ssm.ops.triton.k_activations",
    "dropin.mamba_ssm.ops.triton.layer_norm",
    "dropin.mamba_ssm.ops.triton.layernorm_gated",
    "dropin.mamba_ssm.ops.triton.selective_state_update",
    "dropin.mamba_ssm.ops.triton.softplus",
    "dropin.mamba_ssm.ops.triton.ssd_combined",
    "dropin.rows",
    "ops.ssd",
    "runtime.adapter",
    "runtime.adapter_reading",
    "checkpoint.dtypes",
    "runtime.calibration",
    "runtime.chat_rendering",
    "runtime.chat_template",
    "runtime.convert",
    "runtime.engine",
    "runtime.generation",
    "runtime.identity",
    "runtime.inspection",
    "runtime.kinds",
    "runtime.loading",
    "checkpoint.mmap",
    "runtime.merge",
    "runtime.native",
    "runtime.positions",
    "runtime.processors",
    "checkpoint.quantization.arithmetic",
    "runtime.quantize_checkpoint",
    "runtime.sampling",
    "runtime.sampling_settings",
    "runtime.scoring",
    "runtime.state",
    "runtime.streaming",
    "runtime.suggested_sampling",
    "runtime.tokenizer",
    "checkpoint.tokenizer.reader",
    "runtime.weights",
    "training.arguments",
    "training.data",
    "training.dropout",
    "training.finetune",
    "training.instructions",
    "training.settings",
    "training.tokenizers",
}


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    # By its name: what a package gives out under it may be a function.
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        pytest.skip(f"{name} adapts {error.name}, which is not installed")
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    short = name.removeprefix("anymamba.")
    assert tried > 0 or not (short in WITH_EXAMPLES or short.startswith("checkpoint."))


def test_no_module_is_missing() -> None:
    assert {name.removeprefix("anymamba.") for name in NAMES} >= WITH_EXAMPLES
