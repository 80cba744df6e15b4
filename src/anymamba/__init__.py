"""AnyMamba: the Mamba selective state space model for any machine.

The public names load on first use: `import anymamba` by itself imports neither torch,
transformers nor numpy.
"""

from __future__ import annotations

import sys

# As typing has it, whose import takes longer than all else here.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from anymamba.modeling import (
        FalconMambaConfig,
        FalconMambaForCausalLM,
        FalconMambaModel,
        FalconMambaPreTrainedModel,
        Mamba2Config,
        Mamba2ForCausalLM,
        Mamba2Model,
        Mamba2PreTrainedModel,
        MambaCache,
        MambaCausalLMOutput,
        MambaConfig,
        MambaForCausalLM,
        MambaModel,
        MambaOutput,
        MambaPreTrainedModel,
        load_causal_lm,
        register,
        unregister,
    )
    from anymamba.runtime.engine import Engine
    from anymamba.runtime.generation import Sampling
    from anymamba.runtime.loading import load
    from anymamba.runtime.state import State

__version__ = "0.1.0"

_HOME_OF = {
    "Engine": "anymamba.runtime.engine",
    "FalconMambaConfig": "anymamba.modeling",
    "FalconMambaForCausalLM": "anymamba.modeling",
    "FalconMambaModel": "anymamba.modeling",
    "FalconMambaPreTrainedModel": "anymamba.modeling",
    "Mamba2Config": "anymamba.modeling",
    "Mamba2ForCausalLM": "anymamba.modeling",
    "Mamba2Model": "anymamba.modeling",
    "Mamba2PreTrainedModel": "anymamba.modeling",
    "MambaCache": "anymamba.modeling",
    "MambaCausalLMOutput": "anymamba.modeling",
    "MambaConfig": "anymamba.modeling",
    "MambaForCausalLM": "anymamba.modeling",
    "MambaModel": "anymamba.modeling",
    "MambaOutput": "anymamba.modeling",
    "MambaPreTrainedModel": "anymamba.modeling",
    "Sampling": "anymamba.runtime.generation.sampling",
    "State": "anymamba.runtime.state.state",
    "load": "anymamba.runtime.loading",
    "load_causal_lm": "anymamba.modeling",
    "register": "anymamba.modeling",
    "unregister": "anymamba.modeling",
}

__all__ = [
    "Engine",
    "FalconMambaConfig",
    "FalconMambaForCausalLM",
    "FalconMambaModel",
    "FalconMambaPreTrainedModel",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2Model",
    "Mamba2PreTrainedModel",
    "MambaCache",
    "MambaCausalLMOutput",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "MambaOutput",
    "MambaPreTrainedModel",
    "Sampling",
    "State",
    "__version__",
    "load",
    "load_causal_lm",
    "register",
    "unregister",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anymamba' has no attribute {name!r}")
    from importlib import import_module

    try:
        value = getattr(import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "jaxtyping"):
            raise
        from anymamba.errors import MissingDependencyError

        raise MissingDependencyError(
            f"anymamba.{name} needs the package {error.name!r}, which is not installed: "
            "pip install 'anymamba[torch]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _RenamedModules:
    """Finds modules by their names of release 0.1, after all other finders."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        if not name.startswith("anymamba."):
            return None
        from anymamba.renamed import find_renamed

        return find_renamed(name)


sys.meta_path.append(_RenamedModules)  # type: ignore[arg-type]
