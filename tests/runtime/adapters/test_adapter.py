"""Adapters merged without torch: equal to what PEFT itself makes of them."""

import json
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import anymamba
from anymamba import MambaConfig, MambaForCausalLM, load
from anymamba.checkpoint.gguf.names import is_gguf
from anymamba.errors import AnyMambaError, CheckpointError, ConfigError, StateError
from anymamba.runtime.adapters.adapter_file import read_adapter
from anymamba.runtime.convert.merging import merge
from tests.support.files import refusal
from tests.support.tolerance import assert_same

pytestmark = pytest.mark.slow

TARGETS = ["x_proj", "embeddings", "in_proj", "out_proj"]
IDS = [1, 50, 7, 7, 33, 12]
# PEFT multiplies and adds in float32 too, in another order: a few roundings of a sum of r products.
ROUNDING = 1e-6
# The design's bound for whole models in float32, times the largest logit.


def write_base(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 8}
    config = MambaConfig(**sizes, initializer_range=0.3, **fields)
    MambaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter as PEFT writes it, none of whose numbers are zero."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **settings}
    anymamba.register()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                LoraConfig(task_type="CAUSAL_LM", **settings),
            )
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_magnitude" in name:
                    parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
                elif "lora_" in name:
                    parameter.data = 0.2 * torch.randn_like(parameter)
            model.save_pretrained(folder)
    finally:
        anymamba.unregister()
    return folder


def merged_by_peft(base: Path, adapter: Path) -> Any:
    anymamba.register()
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    finally:
        anymamba.unregister()


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].float().numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter"))


def edited(adapter: Path, folder: Path, **settings: Any) -> Path:
    """The adapter with other settings."""
    folder.mkdir()
    fields = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


KINDS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "DoRA with rsLoRA": {"use_dora": True, "use_rslora": True},
    "ranks and alphas of some": {
        "rank_pattern": {"layers.0.mixer.in_proj": 2},
        "alpha_pattern": {"x_proj": 3, "embeddings": 5},
    },
    "without embeddings": {"target_modules": ["in_proj", "out_proj", "dt_proj"]},
    "untied model": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_of_peft(kind: str, base: Path, tmp_path: Path) -> None:
    if kind == "untied model":
        base = write_base(tmp_path / "base", tie_word_embeddings=False)
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    reference = merged_by_peft(base, adapter)
    reference.save_pretrained(tmp_path / "peft")
    written = merge(adapter, tmp_path / "merged")
    ours, theirs = (load_file(f / "model.safetensors") for f in (written, tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_same(ours[name], expected, ROUNDING)
    expected = logits_of(reference)
    # The adapter does something, or equality would say nothing.
    assert np.abs(expected - logits_of(MambaForCausalLM.from_pretrained(base))).max() > 0.1
    for engine in (load(base, adapter=adapter), load(adapter=adapter), load(written)):
        assert_same(engine.logits(IDS), expected)


def test_an_adapter_of_tied_embeddings_leaves_the_head(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["embeddings"])
    written = merge(adapter, tmp_path / "merged")
    table = load_file(base / "model.safetensors")["backbone.embeddings.weight"]
    tensors = load_file(written / "model.safetensors")
    assert np.array_equal(tensors["lm_head.weight"], table)
    assert not np.allclose(tensors["backbone.embeddings.weight"], table)
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
    assert load(adapter=adapter).n_parameters == load(base).n_parameters + table.size


@pytest.mark.parametrize("kind", ["auto", "f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_storage_is_that_of_the_merged_model(
    stored: torch.dtype, kind: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", stored)
    adapter = write_adapter(base, tmp_path / "adapter")
    engine = load(base, kind, adapter=adapter)
    # The same sums, rounded to the stored type once and then converted, or converted at once.
    written = merge(adapter, tmp_path / "merged", weights=None if kind == "auto" else "f32")
    reference = load(written, kind)
    assert engine.weight_type == reference.weight_type
    if kind == "auto":
        assert engine.weight_bytes == reference.weight_bytes
    assert np.array_equal(engine.logits(IDS), reference.logits(IDS))


def test_quantized_weights_are_merged_as_the_numbers_they_stand_for(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    from anymamba.runtime.convert.quantizing import quantize_checkpoint

    small = quantize_checkpoint(base, tmp_path / "small", weights="int8", group=64)
    engine = load(small, adapter=adapter)
    assert engine.weight_type == "int8"
    exact = load(small, "f32", adapter=adapter)
    # 8 bits move the logits by less than the adapter does, by far.
    assert_same(engine.logits(IDS), exact.logits(IDS), 0.05)
    assert np.abs(exact.logits(IDS) - load(small).logits(IDS)).max() > 0.1
    with pytest.raises(ConfigError, match="int8 already"):
        load(small, "int4", adapter=adapter)
    with pytest.raises(CheckpointError, match="quantized"):
        merge(adapter, tmp_path / "merged", small)


def test_a_gguf_model_takes_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from anymamba.runtime.convert.conversion import convert

    file = convert(base, tmp_path / "model.gguf", "gguf", "f32")
    assert is_gguf(file)
    expected = load(base, adapter=adapter).logits(IDS)
    assert_same(load(file, adapter=adapter).logits(IDS), expected)
    merge(adapter, tmp_path / "merged", file)
    assert_same(load(tmp_path / "merged").logits(IDS), expected)


def test_a_state_belongs_to_the_adapter_too(base: Path, adapter: Path, tmp_path: Path) -> None:
    state = tmp_path / "one.state"
    with_adapter = load(base, adapter=adapter)
    with_adapter.prefill(with_adapter.state(), IDS).save(state)
    load(base, "int8", adapter=adapter).load_state(state)
    louder = edited(adapter, tmp_path / "louder", lora_alpha=24)
    for other in (load(base), load(base, adapter=louder)):
        with pytest.raises(StateError):
            other.load_state(state)


def test_the_tokenizer_and_the_end_are_the_adapters(tmp_path: Path) -> None:
    from anymamba.assets import bundled_model

    bundled = bundled_model()
    adapter = write_adapter(bundled, tmp_path / "adapter", r=1, target_modules=["x_proj"])
    assert load(bundled, adapter=adapter).tokenize("Hi") == [72, 105]
    (adapter / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    tokenizer = json.loads((bundled / "tokenizer.json").read_text())
    special = {"id": 0, "content": "Ā", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"] = [special | flags]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    engine = load(bundled, adapter=adapter)
    assert engine.end_ids == (3, 4)
    assert engine.tokenize("HiĀ") == [72, 105, 0]
    merge(adapter, tmp_path / "merged", bundled)
    assert load(tmp_path / "merged").tokenize("HiĀ") == [72, 105, 0]


REFUSED = {
    "peft_type": "LOHA",
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "layer_replication": [[0, 1]],
    "init_lora_weights": "pissa",
    "ensure_weight_tying": True,
    "use_qalora": True,
    "something_of_next_year": 1,
    "alpha_pattern": {"(a+)+b": 2},
    "lora_alpha": "16",
    "r": 5,
    "use_dora": True,
    "rank_pattern": {"in_proj": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_merged_is_refused_by_name(name: str, adapter: Path, tmp_path: Path) -> None:
    other = edited(adapter, tmp_path / "other", **{name: REFUSED[name]})
    word = {"r": "rank", "use_dora": "magnitude", "rank_pattern": "rank"}.get(name, name)
    assert word in refusal(CheckpointError, load, adapter=other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_rslora", "x"), ("use_rslora", 1), ("use_dora", "no"), ("lora_alpha", 10**400)],
)
def test_a_setting_of_another_type_is_refused(
    name: str, value: object, adapter: Path, tmp_path: Path
) -> None:
    other = edited(adapter, tmp_path / "other", **{name: value})
    assert re.search(f"{name}.* must be", refusal(CheckpointError, load, adapter=other))


def broken_tensors(kind: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    first = "base_model.model.backbone.layers.0.mixer.in_proj.lora_"
    A, B = f"{first}A.weight", f"{first}B.weight"
    match kind:
        case "a factor is missing":
            del tensors[B]
        case "factors of two ranks":
            tensors[A] = tensors[A][:2].copy()
        case "no matrix":
            tensors[A] = tensors[A].reshape(-1)
        case "of another width":
            tensors[A] = np.ones((4, 7), np.float32)
        case "another layer":
            tensors = {n.replace("layers.1", "layers.9"): t for n, t in tensors.items()}
        case "a convolution":
            tensors = {n.replace("in_proj", "conv1d"): t for n, t in tensors.items()}
        case "whole weights":
            tensors["base_model.model.lm_head.weight"] = np.ones((2, 2), np.float32)
        case "integers":
            tensors[A] = tensors[A].astype(np.int32)
        case "NaN":
            tensors[A][0, 0] = np.nan
        case "too large":
            tensors[A][:] = 1e38
        case "nothing":
            tensors = {}
    return tensors


@pytest.mark.parametrize(
    "kind",
    [
        *("a factor is missing", "factors of two ranks", "no matrix", "of another width"),
        *("another layer", "a convolution", "whole weights", "integers", "NaN", "too large"),
        "nothing",
    ],
)
def test_broken_weights_are_refused(kind: str, adapter: Path, tmp_path: Path) -> None:
    other = edited(adapter, tmp_path / "other")
    file = other / "adapter_model.safetensors"
    tensors = broken_tensors(kind, load_file(file))
    save_file(tensors, file)
    refusal(CheckpointError, load, adapter=other)
    with pytest.raises(CheckpointError):
        merge(other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_dead_row_of_a_dora_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", use_dora=True)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    tensors[name] = tensors[name][1:].copy()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="magnitude of shape"):
        read_adapter(adapter)


def test_files_broken_at_random_are_refused_or_read(adapter: Path, tmp_path: Path) -> None:
    """Bytes changed anywhere in front, cut short, or made longer: an error of ours, or a model."""
    random = np.random.default_rng(0)
    other = edited(adapter, tmp_path / "other")
    for _ in range(150):
        name = ("adapter_config.json", "adapter_model.safetensors")[int(random.integers(2))]
        data = bytearray((adapter / name).read_bytes())
        for place in random.integers(0, min(len(data), 1500), random.integers(1, 5)):
            data[place] = int(random.integers(256))
        end = len(data) if random.random() < 0.7 else int(random.integers(len(data)))
        (other / name).write_bytes(bytes(data[:end]))
        with suppress(AnyMambaError):
            load(adapter=other).logits(IDS)
        (other / name).write_bytes((adapter / name).read_bytes())


def test_missing_and_pickled_files_are_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no adapter"):
        load(adapter=tmp_path / "nowhere")
    other = edited(adapter, tmp_path / "other", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="--model"):
        load(adapter=other)
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load(adapter=other)
