"""`mamba_ssm` and `causal_conv1d` for programs that import them, on any machine.

After `install()`, the modules of this folder answer under the names of the two packages.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection

from anymamba.dropin.dispatch import answering
from anymamba.dropin.finder import Finder
from anymamba.dropin.metadata import DistributionsFinder
from anymamba.dropin.transformers_finder import MixersFinder, give_back, take_again
from anymamba.errors import InputError
from anymamba.upstream import NAMES, PACKAGES, is_left_alone, is_original_installed, keep_apart

__all__ = ["install", "is_installed", "uninstall"]

_finders = (Finder(), DistributionsFinder())
_mixers_finder = MixersFinder()

# One of these is among the globals of each Transformers model that uses the packages.
_LOOKED_UP = ("causal_conv1d_fn", "selective_scan_fn", "mamba_chunk_scan_combined")


def install(force: bool = False, *, own: Collection[str] = (), decode_steps: bool = True) -> None:
    """Answer imports of `mamba_ssm` and `causal_conv1d` with AnyMamba, in this process.

    Where an original package is installed, calls whose tensors are on CUDA go on to it, and so do
    imports of what AnyMamba lacks. Programs that hold the originals' functions from before keep
    them. A second call changes what the arguments say.

    The names of the compiled extensions, `selective_scan_cuda` and `causal_conv1d_cuda`, are
    answered as well.

    Args:
        force: whether to take calls with CUDA tensors as well.
        own: packages that the program brings itself, such as a fork of `mamba_ssm`: they are left
            alone, and their extensions answered.
        decode_steps: whether the mixers of Transformers' models with Mamba's layers or Mamba-2's,
            which docs/drop-in.md lists, take plain decode steps on a CPU in one native call. For
            this the forward of their classes is replaced when Transformers imports them. Not with
            packages of the program's own.

    Raises:
        InputError: `own` names neither of the two packages.

    Warns:
        RuntimeWarning: a Transformers model that uses these packages was imported before; it
            goes on without the drop-in.

    Example:
        >>> import anymamba.dropin
        >>> anymamba.dropin.install()
        >>> from mamba_ssm import Mamba
        >>> anymamba.dropin.uninstall()
    """
    own = _packages(own)
    if is_installed() and own != {name for name in PACKAGES if is_left_alone(name)}:
        uninstall()
    _take_decode_steps(decode_steps and not own)
    if not is_installed():
        _warn_of_models_imported_before()
        keep_apart(True, leave=own)
        sys.meta_path[:0] = _finders
    answered = [] if force else [name for name in NAMES if name not in own]
    answering.clear()
    answering.update(name for name in answered if is_original_installed(name))


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
    _take_decode_steps(False)
    keep_apart(False)


def is_installed() -> bool:
    """Whether AnyMamba answers the imports of this process.

    Example:
        >>> import anymamba.dropin
        >>> anymamba.dropin.is_installed()
        False
    """
    return _finders[0] in sys.meta_path


def _take_decode_steps(take: bool) -> None:
    if take and _mixers_finder not in sys.meta_path:
        sys.meta_path.insert(0, _mixers_finder)
        take_again()
    if not take:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _mixers_finder]
        give_back()


def _packages(own: Collection[str]) -> set[str]:
    for name in own:
        if name not in PACKAGES:
            raise InputError(f"own names {name!r}, expected some of {', '.join(PACKAGES)}")
    return set(own)


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
