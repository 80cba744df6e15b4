"""`mamba_ssm` and `causal_conv1d` for programs that import them, on any machine.

After `install()`, the modules of this folder answer under the names of the two packages.
"""

from __future__ import annotations

import sys
import warnings

from anymamba.dropin.dispatch import answering
from anymamba.dropin.finder import Finder
from anymamba.dropin.metadata import DistributionsFinder
from anymamba.originals import PACKAGES, is_original_installed, keep_apart

__all__ = ["install", "is_installed", "uninstall"]

_finders = (Finder(), DistributionsFinder())

# One of these is among the globals of each Transformers model that uses the packages.
_LOOKED_UP = ("causal_conv1d_fn", "selective_scan_fn", "mamba_chunk_scan_combined")


def install(force: bool = False) -> None:
    """Answer imports of `mamba_ssm` and `causal_conv1d` with AnyMamba, in this process.

    Where an original package is installed, calls whose tensors are on CUDA go on to it, and so do
    imports of what AnyMamba lacks. Programs that hold the originals' functions from before keep
    them. A second call changes `force` alone.

    Args:
        force: whether to take calls with CUDA tensors as well.

    Warns:
        RuntimeWarning: a Transformers model that uses these packages was imported before; it
            goes on without the drop-in.

    Example:
        >>> import anymamba.dropin
        >>> anymamba.dropin.install()
        >>> from mamba_ssm import Mamba
        >>> anymamba.dropin.uninstall()
    """
    if not is_installed():
        _warn_of_models_imported_before()
        keep_apart(True)
        sys.meta_path[:0] = _finders
    installed = [] if force else [name for name in PACKAGES if is_original_installed(name)]
    answering.clear()
    answering.update(installed)


def uninstall() -> None:
    """Undo `install()`: the names are the original packages' again, or nobody's.

    Modules and functions that programs imported meanwhile stay what they are.

    Example:
        >>> import anymamba.dropin
        >>> anymamba.dropin.uninstall()
        >>> anymamba.dropin.is_installed()
        False
    """
    answering.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in _finders]
    keep_apart(False)


def is_installed() -> bool:
    """Whether AnyMamba answers the imports of this process.

    Example:
        >>> import anymamba.dropin
        >>> anymamba.dropin.is_installed()
        False
    """
    return _finders[0] in sys.meta_path


def _warn_of_models_imported_before() -> None:
    models = [
        name.split(".")[2]
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.")
        and any(function in vars(module) for function in _LOOKED_UP)
    ]
    if models:
        warnings.warn(
            f"Transformers imported its {', '.join(models)} before anymamba.dropin.install() and "
            "goes on without the drop-in: call install() before that import, in a fresh process",
            RuntimeWarning,
            stacklevel=3,
        )
