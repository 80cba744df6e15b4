"""The examples in all docstrings of the package run."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import anymamba
from anymamba.upstream import PACKAGES

NAMES = [found.name for found in pkgutil.walk_packages(anymamba.__path__, "anymamba.")]
# Where every module has examples of its own public names, but for the few named below; and others.
ROOMS = ("checkpoint.", "runtime.", "dropin.mamba_ssm.", "dropin.causal_conv1d.")
WITHOUT_EXAMPLES = {
    *("runtime.network", "runtime.prefill", "runtime.state.batch_state"),
    *("dropin.mamba_ssm.distributed.distributed_utils", "dropin.mamba_ssm.utils.torch"),
    "dropin.mamba_ssm.distributed.tensor_parallel",
}
WITH_EXAMPLES = {
    *("devices", "dropin.common.rows", "ops.ssd", "training.settings"),
    *(f"training.data.{name}" for name in ("documents", "instructions", "tokenizers")),
    *(f"training.finetune.{name}" for name in ("run", "settings")),
    *(f"training.pretrain.{name}" for name in ("arguments", "dropout")),
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
    must = short in WITH_EXAMPLES or (short.startswith(ROOMS) and not is_room)
    assert tried > 0 or not must or short in WITHOUT_EXAMPLES


def test_no_module_is_missing() -> None:
    assert {name.removeprefix("anymamba.") for name in NAMES} >= WITH_EXAMPLES | WITHOUT_EXAMPLES
