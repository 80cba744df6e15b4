"""`from_pretrained` for every layout: Transformers', the original's and minimal's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from anymamba import checkpoint as files
from anymamba.modeling.config import MambaConfig

__all__ = ["FromAnyLayout"]

_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "subfolder", "force_download")


class FromAnyLayout:
    """Mixed in before `PreTrainedModel`: finds out what a checkpoint is, checks it, loads it."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Self:
        """Load a model from a folder or the hub, whatever layout it is in.

        Args:
            pretrained_model_name_or_path: a local folder or a hub id. Three layouts are told
                apart by their `config.json`: Transformers', the original's (`d_model`,
                `ssm_cfg`, ...) and `anymamba.minimal`'s. None takes `config` and `state_dict`
                from the arguments, as Transformers does.
            *model_args: passed on to the model's constructor.
            **kwargs: what Transformers' `from_pretrained` takes: `dtype`, `device_map`,
                `quantization_config`, `revision`, `cache_dir`, `token`, `local_files_only`, ...

        Returns:
            The model, in evaluation mode.

        Raises:
            HubError: the model is neither here nor to be had from the hub.
            CheckpointError: files are missing or broken, or tensors are missing, unexpected or
                misshapen; one message names them all.
        """
        load = super().from_pretrained  # type: ignore[misc]
        if pretrained_model_name_or_path is None or "state_dict" in kwargs:
            return load(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[no-any-return]
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        folder = files.resolve(
            pretrained_model_name_or_path,
            offline=bool(kwargs.get("local_files_only", False)),
            **hub,
        )
        for name in (*_HUB_ARGUMENTS, "local_files_only"):
            kwargs.pop(name, None)
        model: Self = _load_folder(cls, load, folder, model_args, kwargs)
        return model


def _load_folder(
    cls: Any, load: Any, folder: Path, model_args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    found = files.open_checkpoint(folder)
    if "quantization_config" in found.config:
        # Its tensors have other names and types; the quantizer knows them.
        return load(folder, *model_args, **kwargs)
    config = kwargs.pop("config", None)
    if config is None:
        config, kwargs = MambaConfig.from_dict(found.config, return_unused_kwargs=True, **kwargs)
    expected = files.expected_shapes(config.to_dict())
    if not cls.can_generate():
        expected.pop("lm_head.weight", None)
    if found.layout == "transformers" and not found.pickled:
        if not kwargs.get("ignore_mismatched_sizes", False):
            shapes = {name: record.shape for name, record in found.tensors.items()}
            files.check_tensors(shapes, expected, folder)
        return load(folder, *model_args, config=config, **kwargs)
    weights = files.load_torch_state_dict(found, expected)
    return load(None, *model_args, config=config, state_dict=weights, **kwargs)
