"""Loading a folder whose weights AnyMamba rounded to 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from anymamba.checkpoint import Checkpoint, check_tensors
from anymamba.checkpoint.quantized_folder import quantized_bits, quantized_shapes
from anymamba.checkpoint.torch_weights import load_named_tensors
from anymamba.devices import find_device
from anymamba.errors import InputError
from anymamba.modeling.loading.arguments import PASSED_ON, make_config, set_generation_config
from anymamba.modeling.loading.tensor_names import ties_head
from anymamba.modeling.quantized import QuantizedEmbedding, QuantizedLinear, put_quantized_layers

# What an argument must be, if it is given, and why.
_ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "dtype": (("auto", torch.float32, "float32"), "a quantized model computes in float32"),
    "torch_dtype": (("auto", torch.float32, "float32"), "a quantized model computes in float32"),
    "quantization_config": ((), "the folder is quantized already"),
    "ignore_mismatched_sizes": ((False,), "a quantized tensor has one size"),
    "attn_implementation": (("eager",), "a Mamba has no attention"),
    "experts_implementation": (("eager",), "a Mamba has no experts"),
    "use_kernels": ((False,), "a quantized model has kernels of its own"),
    "kernel_config": ((), "a quantized model has kernels of its own"),
}


def is_ours(quantization: Any) -> bool:
    """Whether a config's `quantization_config` is of AnyMamba's own format.

    Example:
        >>> is_ours({"quant_method": "gptq"}), is_ours({"format": "anymamba"})
        (False, True)
    """
    return isinstance(quantization, dict) and "quant_method" not in quantization


def load_quantized(
    cls: Any, found: Checkpoint, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A model on our own 8 or 4 bits, and what Transformers tells of loading one.

    Raises:
        CheckpointError: tensors are missing, unexpected or of a wrong shape.
        InputError: an argument has no meaning for a quantized model.
        BackendError: there is no such device.
    """
    fields = {key: value for key, value in found.config.items() if key != "quantization_config"}
    quantized_bits(found.config)
    place = _one_device(keywords.pop("device_map", None))
    given = {name: keywords.pop(name) for name in (*_ONLY, "generation_config") if name in keywords}
    _refuse_others(given)
    config = make_config(cls, fields, keywords)
    shapes = {name: record.shape for name, record in found.tensors.items()}
    expected = quantized_shapes(found.config, shapes)
    if not ties_head(cls):
        expected = {name: shape for name, shape in expected.items() if "lm_head" not in name}
    check_tensors(shapes, expected, found.folder)
    # What else Transformers takes changes nothing: the model is not divided among devices.
    constructor = {name: value for name, value in keywords.items() if name not in PASSED_ON}
    with torch.device("meta"):
        model = cls(config, *arguments, **constructor)
    _put_weights(model, found)
    model.config.quantization_config = dict(found.config["quantization_config"])
    set_generation_config(model, found.folder, given.get("generation_config"))
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise InputError(
            f"{cls.__name__} has tensors that a quantized folder cannot hold ({left[0]}); load the "
            "model as it was before it was quantized"
        )
    lists = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    if place is not None:
        model.to(place)
    return model.eval(), {name: set() for name in lists}


def _refuse_others(given: Mapping[str, Any]) -> None:
    for name, (allowed, reason) in _ONLY.items():
        value = given.get(name)
        if value is not None and value not in allowed:
            raise InputError(f"{name}: {reason}; leave the argument out")


def _one_device(device_map: Any) -> torch.device | None:
    """The device that a map names for all parts, a GPU if there is one for "auto"; None for None.

    Raises:
        InputError: the map names several devices, or something else.
        BackendError: there is no such device.
    """
    if device_map is None:
        return None
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    devices = {_device_name(place) for place in places}
    name = devices.pop() if len(devices) == 1 else None
    if name is None:
        raise InputError(
            f"device_map is {device_map!r}: a quantized model lies on one device; name it, such as "
            'device_map="cuda"'
        )
    return find_device(name)


def _device_name(place: Any) -> str | None:
    """A device by one name, for 0, "cuda" and "cuda:0" are the same one; None for what is none."""
    if place == "auto":
        return "auto"
    if isinstance(place, int) and not torch.accelerator.is_available():
        place = f"cuda:{place}"  # PyTorch refuses the number
    try:
        name = str(torch.device(place))
    except (RuntimeError, TypeError):
        return None
    if name == "cuda":
        name = f"cuda:{torch.cuda.current_device() if torch.cuda.is_available() else 0}"
    return name


def _put_weights(model: Any, found: Checkpoint) -> None:
    weights = load_named_tensors(found)
    if not ties_head(type(model)):
        weights = {n.removeprefix("backbone."): w for n, w in weights.items() if "lm_head" not in n}
    put_quantized_layers(model, weights)
    model.load_state_dict(weights, strict=False, assign=True)
    tied = ties_head(type(model)) and model.config.tie_word_embeddings
    if tied and "lm_head.weight" not in weights:
        _tie(model)  # now, because loading puts another table in the place of the empty one


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
