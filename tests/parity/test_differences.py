"""The README's table of what AnyMamba does and Transformers' Mamba does not, row by row.

Each test sees both at the same task with the same weights, so that the table can neither flatter
nor grow old: when Transformers learns one of these things, its row has to go.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import anymamba

pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("5.24."), reason="the table is about Transformers 5.24"
)

# What float32 rounds is below, what a wrong state or a seen mask does to random weights far above.
SAME = 1e-4
DIFFERENT = 1e-2

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "use_bias": True,
}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Transformers' Mamba and AnyMamba's, with equal weights in which biases matter."""
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ours = anymamba.MambaForCausalLM(anymamba.MambaConfig(**SHAPE)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(40, (1, 24), generator=torch.Generator().manual_seed(1))


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest value expected."""
    return float(((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).detach())


@torch.no_grad()
def test_several_tokens_on_top_of_a_state(models: tuple[Any, Any], tokens: Tensor) -> None:
    errors = []
    for model in models:
        state = model(tokens[:, :12], use_cache=True).cache
        continued = model(tokens[:, 12:], cache=state).logits
        errors.append(distance(continued, model(tokens).logits[:, 12:]))
    theirs, ours = errors
    assert theirs > DIFFERENT
    assert ours < SAME


@torch.no_grad()
@pytest.mark.parametrize(
    "masked", [slice(0, 6), slice(8, 14)], ids=["on the left", "in the middle"]
)
def test_masked_positions(models: tuple[Any, Any], tokens: Tensor, masked: slice) -> None:
    mask = torch.ones_like(tokens)
    mask[:, masked] = 0
    kept = mask[0].bool()
    theirs, ours = (
        distance(model(tokens, attention_mask=mask).logits[:, kept], model(tokens[:, kept]).logits)
        for model in models
    )
    assert theirs > DIFFERENT
    assert ours < SAME


@torch.no_grad()
@pytest.mark.parametrize("argument", ["seq_idx", "cu_seq_lens_q", "position_ids"])
def test_packed_documents(models: tuple[Any, Any], tokens: Tensor, argument: str) -> None:
    marks = {
        "seq_idx": torch.arange(24)[None] // 12,
        "cu_seq_lens_q": torch.tensor([0, 12, 24]),
        "position_ids": torch.arange(24)[None] % 12,
    }
    theirs, ours = (
        distance(
            model(tokens, **{argument: marks[argument]}).logits[:, 12:],
            model(tokens[:, 12:]).logits,
        )
        for model in models
    )
    assert theirs > DIFFERENT
    assert ours < SAME


def test_kinds_of_state(models: tuple[Any, Any], tokens: Tensor) -> None:
    theirs, ours = (model(tokens, use_cache=True).cache for model in models)
    assert type(theirs) is transformers.DynamicCache
    assert type(ours) is anymamba.MambaCache
    assert not hasattr(theirs, "save")


def test_hidden_states(models: tuple[Any, Any], tokens: Tensor) -> None:
    theirs, ours = (model(tokens, output_hidden_states=True).hidden_states for model in models)
    assert len(theirs) == len(ours) == SHAPE["num_hidden_layers"] + 1
    theirs_model, ours_model = models
    assert torch.equal(ours[0], ours_model.backbone.embeddings(tokens))
    for their_layer, our_layer in zip(theirs[:-1], ours[1:], strict=True):
        assert distance(our_layer, their_layer) < SAME
    assert distance(theirs[-1], theirs_model.backbone.norm_f(theirs[-2])) < SAME


@torch.no_grad()
def test_the_original_layout(models: tuple[Any, Any], tokens: Tensor, tmp_path: Path) -> None:
    ours = models[1]
    description = {
        "d_model": SHAPE["hidden_size"],
        "n_layer": SHAPE["num_hidden_layers"],
        "vocab_size": SHAPE["vocab_size"],
        "ssm_cfg": {"bias": SHAPE["use_bias"]},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(description), encoding="utf-8")
    weights = {
        name.replace("embeddings.", "embedding."): value
        for name, value in ours.state_dict().items()
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.MambaForCausalLM.from_pretrained(tmp_path)
    loaded = anymamba.MambaForCausalLM.from_pretrained(tmp_path)
    assert distance(loaded(tokens).logits, ours(tokens).logits) < SAME


@torch.no_grad()
def test_int8_with_torchao(models: tuple[Any, Any], tokens: Tensor) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    theirs, ours = (copy.deepcopy(model) for model in models)
    for model in (theirs, ours):
        quantization.quantize_(model.backbone, quantization.Int8WeightOnlyConfig())
    with pytest.raises(NotImplementedError, match="Int8Tensor"):
        theirs(tokens)

    # The same rounded weights, written out in float32.
    written_out = copy.deepcopy(models[1])
    rounded = 0
    for name, parameter in ours.named_parameters():
        if hasattr(parameter, "dequantize") and type(parameter) is not torch.nn.Parameter:
            written_out.get_parameter(name).copy_(parameter.dequantize())
            rounded += 1
    assert rounded == 4 * SHAPE["num_hidden_layers"]  # in, x, dt and out
    assert distance(ours(tokens).logits, written_out(tokens).logits) < SAME


def test_adapters_of_out_proj(models: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = models
    settings = {"r": 2, "target_modules": ["out_proj"], "task_type": "CAUSAL_LM"}
    anymamba.register()
    try:
        with pytest.raises(ValueError, match="out_proj"):
            peft.get_peft_model(type(theirs)(theirs.config), peft.LoraConfig(**settings))
        adapted = peft.get_peft_model(type(ours)(ours.config), peft.LoraConfig(**settings))
    finally:
        anymamba.unregister()
    assert [name for name, _ in adapted.named_parameters() if "out_proj.lora_A" in name]
