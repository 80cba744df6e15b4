"""The model that comes with the package, so that everything can be tried without a download.

It is a byte-level Mamba of about three million parameters that imitates Shakespeare. Its model
card (`README.md` in its folder) says how it was trained and how good it is; the recipe is
`examples/shakespeare/recipe.yaml`.
"""

from __future__ import annotations

from pathlib import Path

from anymamba.errors import CheckpointError

__all__ = ["bundled_model"]


def bundled_model() -> Path:
    """The folder of the bundled model, in the layout that Transformers uses.

    >>> from anymamba import MambaForCausalLM
    >>> model = MambaForCausalLM.from_pretrained(bundled_model())
    """
    folder = Path(__file__).with_name("shakespeare")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(
            f"the bundled model is not installed: {weights} is missing. Install anymamba again, "
            "or name a model of your own (a folder, or a name on the hub)"
        )
    return folder
