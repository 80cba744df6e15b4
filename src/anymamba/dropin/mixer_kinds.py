"""What the native core must know of Transformers' mixers: their modules, tensors and settings.

There are two kinds. Those of Mamba, Falcon-Mamba and Jamba have a decay for each channel and state;
those of Mamba-2, Bamba, Zamba2, Nemotron-H, Granite-4.0-h and Falcon-H1 have heads with one decay.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from anymamba.checkpoint.architecture import MAMBA, MAMBA2
from anymamba.layers.native import PROJECTIONS, Part, core_tensors, mixer_parts


class MixerKind:
    """The mixers of Mamba, and what those of Mamba-2 have in common with them.

    Attributes:
        functions: what a step of Transformers' code calls, by the names in a model's module.
        projections: the linear layers.
        settings: what decides a module's result beside its weights.
    """

    functions: tuple[str, ...] = ("causal_conv1d_update", "mamba_selective_state_update")
    projections: tuple[str, ...] = PROJECTIONS
    settings: tuple[str, ...] = (
        *("activation", "time_step_rank", "ssm_state_size", "eps", "variance_epsilon"),
        *("stride", "dilation", "groups", "padding_mode"),
    )
    # The norms of Falcon-Mamba and Jamba, and their names in the core.
    _norms = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}  # noqa: RUF012

    def norm_class(self, module: ModuleType) -> type[nn.Module] | None:
        """The class of the mixers' norms in one of Transformers' modules, if they have any."""
        for name in ("JambaRMSNorm", "FalconMambaWeightlessRMSNorm"):
            if hasattr(module, name):
                found: type[nn.Module] = getattr(module, name)
                return found
        return None

    def parts(self, mixer: Any) -> Iterator[Part]:
        """The modules that a native step goes past."""
        yield from mixer_parts(mixer, (mixer.hidden_size, *mixer.A_log.shape, mixer.time_step_rank))
        if self._has_norms(mixer):
            for name in self._norms:
                yield Part(name, getattr(mixer, name), _norm_class_of(self, mixer))

    def why_not_usual(self, mixer: Any) -> str | None:
        """Why the mixer's sizes or norms are not what the core assumes, or None."""
        e, n = mixer.A_log.shape
        if mixer.ssm_state_size != n or mixer.conv1d.weight.shape[:2] != (e, 1):
            return "its sizes are not those of its weights"
        if self._has_norms(mixer) and len({_eps(getattr(mixer, name)) for name in self._norms}) > 1:
            return "its norms have several epsilons"
        return None

    def layer(self, mixer: Any) -> dict[str, Any]:
        """The tensors as the core names them, the model's own memory every one of them."""
        tensors = core_tensors(mixer, MAMBA)
        if self._has_norms(mixer):
            widths = (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
            for (name, name_in_core), width in zip(self._norms.items(), widths, strict=True):
                # Falcon-Mamba's norms have a buffer of this name, which they do not use.
                weight = getattr(mixer, name)._parameters.get("weight")
                plain = torch.ones(width, dtype=torch.float32, device="cpu")
                tensors[name_in_core] = plain if weight is None else weight.detach()
        return tensors

    def core_options(self, mixer: Any) -> dict[str, Any]:
        """What the core takes beside the tensors."""
        return {"eps": _eps(mixer.dt_layernorm)} if self._has_norms(mixer) else {}

    def state_shape(self, mixer: Any) -> tuple[int, ...]:
        """A row's state, (e, n)."""
        return tuple(mixer.A_log.shape)

    def input_scale(self, mixer: Any) -> float:
        """What the mixer multiplies its input by."""
        return 1.0

    def _has_norms(self, mixer: nn.Module) -> bool:
        return hasattr(mixer, "dt_layernorm")


class HeadsKind(MixerKind):
    """The mixers of Mamba-2 and of the hybrids with its layers."""

    functions = ("causal_conv1d_update", "mamba2_selective_state_update")
    projections = ("in_proj", "out_proj")
    settings = (
        *("activation", "num_heads", "head_dim", "n_groups", "intermediate_size", "conv_dim"),
        *("ssm_state_size", "mamba_rms_norm", "ssm_in_multiplier"),
        *("variance_epsilon", "group_size", "norm_before_gate"),
        *("stride", "dilation", "groups", "padding_mode"),
    )

    def norm_class(self, module: ModuleType) -> type[nn.Module] | None:
        """The class of the gated norms, whose name begins with the model's."""
        classes = (value for name, value in vars(module).items() if name.endswith("RMSNormGated"))
        return next(classes, None)

    def parts(self, mixer: Any) -> Iterator[Part]:
        """The modules that a native step goes past."""
        d, e = mixer.hidden_size, mixer.intermediate_size
        yield Part("conv1d", mixer.conv1d, nn.Conv1d)
        yield Part("in_proj", mixer.in_proj, nn.Linear, (e + mixer.conv_dim + mixer.num_heads, d))
        yield Part("out_proj", mixer.out_proj, nn.Linear, (d, e))
        if self._has_norms(mixer):
            settings = {
                "group_size": e // mixer.n_groups,
                "n_groups": mixer.n_groups,
                "norm_before_gate": False,
            }
            yield Part("norm", mixer.norm, _norm_class_of(self, mixer), settings=settings)

    def why_not_usual(self, mixer: Any) -> str | None:
        """Why the mixer's sizes are not what the core assumes, or None."""
        h, p, e = mixer.num_heads, mixer.head_dim, mixer.intermediate_size
        channels = e + 2 * mixer.n_groups * mixer.ssm_state_size
        vectors = (mixer.A_log, mixer.D, mixer.dt_bias)
        fits = (
            h * p == e
            and mixer.conv_dim == channels
            and mixer.conv1d.weight.shape[:2] == (channels, 1)
            and all(vector.shape == (h,) for vector in vectors)
        )
        return None if fits else "its sizes are not those of its weights"

    def layer(self, mixer: Any) -> dict[str, Any]:
        """The tensors as the core names them, the model's own memory every one of them."""
        tensors = core_tensors(mixer, MAMBA2)
        if not self._has_norms(mixer):
            tensors["gated_norm"] = None
        if hasattr(mixer, "mup_vector"):  # Falcon-H1
            tensors["in_proj_scale"] = mixer.mup_vector.flatten()
        return tensors

    def core_options(self, mixer: Any) -> dict[str, Any]:
        """What the core takes beside the tensors; Transformers' step knows no limits."""
        eps = mixer.norm.variance_epsilon if self._has_norms(mixer) else 0.0
        return {"eps": eps, "groups": mixer.n_groups}

    def state_shape(self, mixer: Any) -> tuple[int, ...]:
        """A row's state, (h, p, n)."""
        return mixer.num_heads, mixer.head_dim, mixer.ssm_state_size

    def input_scale(self, mixer: Any) -> float:
        """What the mixer multiplies its input by, in Falcon-H1."""
        return float(getattr(mixer, "ssm_in_multiplier", 1.0))

    def _has_norms(self, mixer: nn.Module) -> bool:
        return bool(getattr(mixer, "mamba_rms_norm", True))


_KINDS = (MixerKind(), HeadsKind())


def kind_of(module: ModuleType) -> MixerKind:
    """The kind of mixers that one of Transformers' modules defines, by the functions it calls."""
    return next(kind for kind in _KINDS if all(hasattr(module, name) for name in kind.functions))


def _norm_class_of(kind: MixerKind, mixer: nn.Module) -> type[nn.Module]:
    found = kind.norm_class(sys.modules[type(mixer).__module__])
    assert found is not None
    return found


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
