"""torchao's weight-only quantization, through Transformers' `TorchAoConfig`."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

from anymamba import MambaConfig, MambaForCausalLM

pytestmark = pytest.mark.slow

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
IDS = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))


def _same(found: torch.Tensor, reference: torch.Tensor, bound: float) -> bool:
    scale = max(1.0, float(reference.abs().max()))
    return torch.allclose(found, reference, rtol=0, atol=bound * scale)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose projections are wide enough for groups of 128."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=128, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_int8_computes_what_its_weights_say(folder: Path, registered: None) -> None:
    plain = MambaForCausalLM.from_pretrained(folder)
    unquantized = plain(IDS).logits
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    )
    assert type(quantized) is MambaForCausalLM
    for ours, reference in zip(quantized.backbone.layers, plain.backbone.layers, strict=True):
        for name in PROJECTIONS:
            weight = getattr(ours.mixer, name).weight
            assert isinstance(weight, Int8Tensor), name
            original = getattr(reference.mixer, name).weight
            rounded = weight.dequantize()
            # int8 a row: 255 steps over twice the row's largest weight.
            step = original.abs().amax(1, keepdim=True) * 2 / 255
            assert bool(((rounded - original).abs() <= 0.51 * step).all()), name
            original.copy_(rounded)
    logits = quantized(IDS).logits
    # Against a plain model with the rounded weights: float32, the bound for whole models. A
    # projection whose weight was read and not called could not come out right.
    assert _same(logits, plain(IDS).logits, 1e-4)
    # 8 bits carry 2 or 3 digits.
    assert _same(logits, unquantized, 1e-2)
    assert quantized.generate(IDS, max_new_tokens=3).shape == (2, 14)


@torch.no_grad()
def test_an_int8_model_is_saved_and_loaded(folder: Path, tmp_path: Path, registered: None) -> None:
    config = TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    quantized.save_pretrained(tmp_path / "int8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert isinstance(loaded.backbone.layers[0].mixer.in_proj.weight, Int8Tensor)
    assert torch.equal(loaded(IDS).logits, quantized(IDS).logits)


INT4 = Int4WeightOnlyConfig(group_size=128)
# torchao's int4 kernels for this packing are in this package, for GPUs.
KERNELS = "mslk"
HAS_KERNEL = torch.cuda.is_available() and importlib.util.find_spec(KERNELS) is not None


def load_int4(folder: Path) -> torch.nn.Module:
    """Transformers' snippet for Mamba, with the name that it leaves undefined put right."""
    quantization_config = TorchAoConfig(quant_type=INT4)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization_config, device_map="auto"
    )


@pytest.mark.skipif(not HAS_KERNEL, reason="torchao has no kernel for it here")
def test_the_documented_int4_example_where_there_is_a_kernel(
    folder: Path, registered: None
) -> None:
    model = load_int4(folder)
    for name in ("in_proj", "x_proj", "out_proj"):
        assert "Int4" in type(getattr(model.backbone.layers[0].mixer, name).weight).__name__
    assert model.generate(IDS.to(model.device), max_new_tokens=3).shape == (2, 14)


@pytest.mark.skipif(HAS_KERNEL, reason="torchao has a kernel for it here")
def test_the_documented_int4_example_where_there_is_none(
    folder: Path, registered: None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ImportError, match=KERNELS):
        quantize_(MambaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), INT4)
    # Transformers puts torchao's reason into its log, and raises an error that points there.
    transformers.logging.enable_propagation()
    try:
        with pytest.raises(RuntimeError, match="CONVERSION"):
            load_int4(folder)
    finally:
        transformers.logging.disable_propagation()
    assert KERNELS in caplog.text


@torch.no_grad()
def test_int4_in_the_one_form_that_torchao_runs_on_a_cpu(folder: Path, registered: None) -> None:
    """Four bits in groups of 128, unpacked to a byte each: it saves no memory over int8."""
    plain = MambaForCausalLM.from_pretrained(folder)
    unquantized = plain(IDS).logits
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))
    # Its rows must divide into the groups; those of dt_proj are too short.
    config = TorchAoConfig(quant_type=config, modules_to_not_convert=[".*dt_proj", "lm_head"])
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for ours, reference in zip(quantized.backbone.layers, plain.backbone.layers, strict=True):
        for name in ("in_proj", "x_proj", "out_proj"):
            weight = getattr(ours.mixer, name).weight
            assert isinstance(weight, IntxUnpackedToInt8Tensor), name
            getattr(reference.mixer, name).weight.copy_(weight.dequantize())
    logits = quantized(IDS).logits
    assert _same(logits, plain(IDS).logits, 1e-4)
    assert not _same(logits, unquantized, 1e-4)
