"""Small models on disk, written without torch and, unquantized ones, the package under test.

Three sizes: `tensors` and `write_folder` where widths must fit blocks of 32, `small_weights` and
`write_small` where no two sizes may be alike, `write_model` where the command line shall be fast.
"""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from anymamba.assets import bundled_model
from anymamba.checkpoint import TensorBytes, write_safetensors
from anymamba.checkpoint.quantization import quantize

# No two sizes alike but those that blocks of 32 ask for: d 32, e 64, n 5, r 3, k 4, v 320.
CONFIG: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "state_size": 5,
    "time_step_rank": 3,
    "expand": 2,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
}
TEXT = "It's a long way, isn't it?  To be   or not to be 1234\n\n\tis THE question. " * 8


# What of a Mamba-2 is another. e is 4 heads of 16, and conv1d has 84 channels.
CONFIG2: dict[str, Any] = CONFIG | {
    "model_type": "mamba2",
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 2,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape in Transformers' names, spelt out; sizes are fields of `config`."""
    v, d, n = (config[name] for name in ("vocab_size", "hidden_size", "state_size"))
    e, k = config.get("expand", 2) * d, config.get("conv_kernel", 4)
    found: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (v, d)}
    for layer in range(config["num_hidden_layers"]):
        h, r = config.get("num_heads", 0), config.get("time_step_rank", 0)
        channels = e + 2 * config.get("n_groups", 0) * n
        of_layer: dict[str, tuple[int, ...]] = {
            "norm.weight": (d,),
            "mixer.in_proj.weight": (e + channels + h, d),
            "mixer.in_proj.bias": (e + channels + h,),
            "mixer.conv1d.weight": (channels, 1, k),
            "mixer.conv1d.bias": (channels,),
        }
        if h:
            of_layer |= {
                "mixer.dt_bias": (h,),
                "mixer.A_log": (h,),
                "mixer.D": (h,),
                "mixer.norm.weight": (e,),
            }
        else:
            of_layer |= {
                "mixer.x_proj.weight": (r + 2 * n, e),
                "mixer.dt_proj.weight": (e, r),
                "mixer.dt_proj.bias": (e,),
                "mixer.A_log": (e, n),
                "mixer.D": (e,),
            }
        of_layer |= {"mixer.out_proj.weight": (d, e), "mixer.out_proj.bias": (d,)}
        if not config.get("use_bias", False):
            del of_layer["mixer.in_proj.bias"], of_layer["mixer.out_proj.bias"]
        if not config.get("use_conv_bias", True):
            del of_layer["mixer.conv1d.bias"]
        if not config.get("use_gated_norm", True):
            del of_layer["mixer.norm.weight"]
        found |= {f"backbone.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    found["backbone.norm_f.weight"] = (d,)
    if not config.get("tie_word_embeddings", True):
        found["lm_head.weight"] = (v, d)
    return found


def tensors(tied: bool = True, layers: int = 2) -> dict[str, NDArray[Any]]:
    """Random weights of the model above in Transformers' names."""
    return _random(CONFIG | {"tie_word_embeddings": tied, "num_hidden_layers": layers})


def _random(config: dict[str, Any]) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {n: 0.3 * rng.standard_normal(s).astype(np.float32) for n, s in shapes(config).items()}


def tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-NeoX has it: control tokens first, runs of spaces last."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_tokens([AddedToken("    ", normalized=True), AddedToken("  ", normalized=True)])
    return made


def write_folder(
    folder: Path, stored: dict[str, NDArray[Any]] | None = None, **changes: Any
) -> Path:
    """A whole model's folder in Transformers' layout, with a tokenizer."""
    folder.mkdir(parents=True)
    config = (CONFIG2 if changes.get("model_type") == "mamba2" else CONFIG) | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_random(config) if stored is None else stored, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer().to_str(), encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    return folder


# Two layers, no two sizes alike: d 24, e 48, n 5, r 3, k 4, v 61.
SMALL: dict[str, Any] = {
    "model_type": "mamba",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "state_size": 5,
    "time_step_rank": 3,
    "bos_token_id": None,
    "eos_token_id": None,
}


def small_weights(seed: int = 0, **fields: Any) -> dict[str, np.ndarray]:
    """Random float32 weights of a model, none of them zero, in Transformers' names."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(SMALL | fields).items():
        if name.endswith("A_log"):
            values = np.log(np.arange(1, shape[1] + 1)) + 0.1 * random.standard_normal(shape)
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            values = 1 + 0.3 * random.standard_normal(shape)
        elif name.endswith("dt_proj.bias"):
            values = np.log(np.expm1(random.uniform(0.01, 0.5, shape)))
        elif name.endswith("bias"):
            values = 0.3 * random.standard_normal(shape)
        else:
            values = random.standard_normal(shape) / np.sqrt(shape[-1])
        tensors[name] = values.astype(np.float32)
    return tensors


def write_small(folder: Path, seed: int = 0, dtype: Any = np.float32, **fields: Any) -> Path:
    """A checkpoint in Transformers' layout. `fields` are of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL | fields))
    tensors = small_weights(seed, **fields)
    save_file({n: t.astype(dtype) for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


# One layer for bytes. A head of its own: with the embeddings for a head a random model says one
# word again and again.
BYTES: dict[str, Any] = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "dtype": "float32",
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "state_size": 16,
    "time_step_rank": 1,
    "conv_kernel": 4,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, **settings: Any) -> Path:
    """A random model of bytes in `folder`, always the same. Needs no torch."""
    random = np.random.default_rng(0)
    # Logits far apart, so that the likeliest token has no rival.
    weights = {
        name: (0.5 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes(BYTES).items()
    }
    for name in ("backbone.norm_f.weight", "backbone.layers.0.norm.weight"):
        weights[name] = np.ones(BYTES["hidden_size"], np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    names: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (folder / "config.json").write_text(json.dumps(BYTES | names | settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder)
    return folder


def with_head(tiny: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    """The tiny model with another head."""
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["lm_head.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LARGE = ("embeddings.weight", "lm_head.weight", "in_proj.weight", "out_proj.weight")
STORED = {"uint8": "U8", "uint16": "BF16", "float32": "F32"}


def write_quantized(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, NDArray[Any]],
    bits: int,
    group: int,
    symmetric: bool = True,
    large: tuple[str, ...] = LARGE,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A folder as `anymamba quantize` writes it, from what is documented.

    `changes` are fields of the format's entry in the config; arrays of uint16 hold bfloat16.
    """
    folder.mkdir(exist_ok=True)
    about = {"format": "anymamba", "format_version": 1, "bits": bits, "group_size": group}
    about |= {"symmetric": symmetric} | (changes or {})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    stored = {}
    for name, tensor in tensors.items():
        made = quantize(tensor, bits, group, symmetric) if name.endswith(large) else None
        parts = (
            {"_q": made.q, "_scales": made.scales, "_minima": made.minima} if made else {"": tensor}
        )
        stored |= {name + end: part for end, part in parts.items() if part is not None}
    entries = {
        name: TensorBytes(STORED[array.dtype.name], array.shape, array.tobytes())
        for name, array in stored.items()
    }
    write_safetensors(folder / "model.safetensors", entries)
    return folder


def rewritten(path: Path, **parts: Any) -> Path:
    """A file of safetensors with other blocks or texts of its header; None takes one out."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    fields = load_file(path) | metadata | parts
    present = {name: value for name, value in fields.items() if value is not None}
    blocks = {name: value for name, value in present.items() if not isinstance(value, str)}
    save_file(blocks, path, {name: present[name] for name in present.keys() - blocks.keys()})
    return path


def types_in(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def peak_memory(call: Callable[..., object], *arguments: Any) -> int:
    """The most bytes that Python and NumPy held for a call."""
    tracemalloc.start()
    try:
        call(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refusal(
    kind: type[Exception], call: Callable[..., Any], *arguments: Any, **options: Any
) -> str:
    """The line of readable length with which a call is refused."""
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    return one_line(caught.value)


def one_line(error: BaseException) -> str:
    """An error's message, which must be a single line of readable length."""
    message = str(error)
    assert message == message.strip()
    assert len(message.splitlines()) == 1
    assert len(message) < 1500
    message.encode("utf-8")
    return message
