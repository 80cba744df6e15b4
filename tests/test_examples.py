"""The examples in all docstrings of the package run."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module

import pytest

import anymamba
from anymamba.upstream import PACKAGES

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
    "dropin.common.rows",
    "ops.ssd",
    "runtime.adapters.merging",
    "runtime.adapters.adapter_file",
    "checkpoint.dtypes",
    "runtime.convert.calibration",
    "runtime.chat.rendering",
    "runtime.chat.template",
    "runtime.convert.conversion",
    "runtime.engine",
    "runtime.generation.token_generator",
    "runtime.state.fingerprint",
    "runtime.analysis.inspection",
    "runtime.weights.weight_types",
    "runtime.loading",
    "checkpoint.safetensors.mmap",
    "runtime.convert.merging",
    "runtime.native",
    "runtime.analysis.losses_by_position",
    "runtime.generation.logits_processors",
    "checkpoint.quantization.arithmetic",
    "runtime.convert.quantizing",
    "runtime.generation.sampling",
    "runtime.generation.sampling_settings",
    "runtime.scoring",
    "runtime.state.state",
    "runtime.generation.detokenizer",
    "runtime.generation.generation_config",
    "runtime.tokenizer",
    "checkpoint.tokenizer.reader",
    "runtime.weights.weights",
    "devices",
    "training.pretrain.arguments",
    "training.data.documents",
    "training.pretrain.dropout",
    "training.finetune.run",
    "training.finetune.settings",
    "training.data.instructions",
    "training.settings",
    "training.data.tokenizers",
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
    is_room = hasattr(module, "__path__")  # whose names have their examples where they are defined
    must = short in WITH_EXAMPLES or (short.startswith("checkpoint.") and not is_room)
    assert tried > 0 or not must


def test_no_module_is_missing() -> None:
    assert {name.removeprefix("anymamba.") for name in NAMES} >= WITH_EXAMPLES
