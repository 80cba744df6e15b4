"""`from_pretrained` for every layout: Transformers', the original's and minimal's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file

from anymamba import checkpoint as files
from anymamba.checkpoint.quantized import quantized_bits, quantized_shapes
from anymamba.checkpoint.reading import canonical_names
from anymamba.errors import InputError
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.quantized import QuantizedEmbedding, QuantizedLinear, put_quantized_layers

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
        if _is_ours(found.config["quantization_config"]):
            return _load_quantized(cls, found, kwargs)
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


def _is_ours(quantization: Any) -> bool:
    return isinstance(quantization, dict) and "quant_method" not in quantization


def _load_quantized(cls: Any, found: files.Checkpoint, kwargs: dict[str, Any]) -> Any:
    """A model on our own 8 or 4 bits; of the arguments only those count that such a model has."""
    for name in ("torch_dtype", "dtype"):
        if kwargs.pop(name, None) not in (None, "auto", torch.float32):
            raise InputError(
                f"{name}: a quantized model computes in float32; leave the argument out"
            )
    if kwargs.pop("quantization_config", None) is not None:
        raise InputError("quantization_config: the folder is quantized already; leave it out")
    quantized_bits(found.config)
    shapes = {name: record.shape for name, record in found.tensors.items()}
    expected = quantized_shapes(found.config, shapes)
    if not cls.can_generate():
        expected = {name: shape for name, shape in expected.items() if "lm_head" not in name}
    files.check_tensors(shapes, expected, found.folder)
    fields = {key: value for key, value in found.config.items() if key != "quantization_config"}
    config = kwargs.pop("config", None) or MambaConfig.from_dict(fields)
    with torch.device("meta"):
        model = cls(config)
    weights: dict[str, torch.Tensor] = {}
    for path in found.files.paths:
        stored = load_file(path)
        weights |= {new: stored[old] for new, old in canonical_names(stored, path).items()}
    put_quantized_layers(model, weights)
    model.load_state_dict(weights, strict=False, assign=True)
    tied = cls.can_generate() and config.tie_word_embeddings
    if tied and "lm_head.weight" not in weights:
        _tie(model)  # now, because loading puts another table in the place of the empty one
    model.config.quantization_config = dict(found.config["quantization_config"])
    return model.eval()


def _tie(model: Any) -> None:
    """The head is the embeddings' table, and is not saved a second time."""
    table = model.backbone.embeddings
    if isinstance(table, QuantizedEmbedding):
        shared = {name: getattr(table, name) for name in table._buffers}
        model.lm_head = QuantizedLinear(table.n, table.k, shared)
        model.lm_head._non_persistent_buffers_set.update(shared)
        # What Transformers ties by name are parameters, which neither layer has.
        model._tied_weights_keys = model.all_tied_weights_keys = {}
    else:
        model.lm_head.weight = table.weight
