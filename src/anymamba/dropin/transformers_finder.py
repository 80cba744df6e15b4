"""Lets Transformers' Mamba mixers take their decode steps in one native call, once imported.

No function that Transformers looks up covers a whole step, so the forward of the mixer's class is
replaced: openly, as docs/drop-in.md says, and undone by `uninstall`. Nothing is imported here.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from anymamba.dropin.common.after_import import AfterImportFinder

MIXERS = {
    "transformers.models.mamba.modeling_mamba": "MambaMixer",
    "transformers.models.falcon_mamba.modeling_falcon_mamba": "FalconMambaMixer",
    "transformers.models.jamba.modeling_jamba": "JambaMambaMixer",
    "transformers.models.mamba2.modeling_mamba2": "Mamba2Mixer",
    "transformers.models.bamba.modeling_bamba": "BambaMixer",
    "transformers.models.zamba2.modeling_zamba2": "Zamba2MambaMixer",
    "transformers.models.nemotron_h.modeling_nemotron_h": "NemotronHMamba2Mixer",
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "transformers.models.falcon_h1.modeling_falcon_h1": "FalconH1Mixer",
}
"""The module of a model, and its mixer's class."""

STEPS = "anymamba.dropin.mixer_steps"


def replace_forward(module: ModuleType) -> None:
    """Replace the forward of a model's mixer."""
    importlib.import_module(STEPS).replace(module, getattr(module, MIXERS[module.__name__]))


class MixersFinder(AfterImportFinder):
    """Finds the modules of `MIXERS` as others do, and replaces the forward of their mixers."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(MIXERS, replace_forward))


def take_again() -> None:
    """Replace again what was given back."""
    if STEPS in sys.modules:
        sys.modules[STEPS].take_again()


def give_back() -> None:
    """Give all mixers the forward back that they had."""
    if STEPS in sys.modules:
        sys.modules[STEPS].give_back()
