"""What others bring to a GPU: torchao, PEFT, TRL, the drop-in and the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba import MambaConfig, MambaForCausalLM
from anymamba.cli.main import main
from anymamba.modeling import why_not_native_loop
from anymamba.modeling.adapters import patch_peft
from tests.modeling.test_quantized import write_folder as write_quantized_folder
from tests.support.models import talkative_model, words
from tests.support.tolerance import assert_same

pytestmark = pytest.mark.slow

IDS = words(2, 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose projections are wide enough for groups of 128."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=128, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_torchao(bits: int, folder: Path, device: torch.device) -> None:
    """As Transformers' page has it: a configuration, and `device_map="auto"`."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    if bits == 4 and device.type != "cuda":
        pytest.skip("torchao's packed 4 bits are for GPUs")
    if bits == 8:
        kind = torchao.Int8WeightOnlyConfig()
    else:
        kind = torchao.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    plain = MambaForCausalLM.from_pretrained(folder)
    model = MambaForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="auto" if device.type == "cuda" else "cpu",
        quantization_config=TorchAoConfig(quant_type=kind),
    )
    assert model.device == device
    found = model(IDS.to(device)).logits.cpu()
    # 4 bits carry little more than one digit.
    assert_same(found, plain(IDS).logits, 5e-2 if bits == 8 else 0.3)
    assert why_not_native_loop(model) is not None, "a graph of weights that are not plain"
    text = model.generate(IDS.to(device), max_new_tokens=4, do_sample=False)
    assert text.shape == (2, 13)


@torch.no_grad()
def test_our_own_quantized_weights(tmp_path: Path, device: torch.device) -> None:
    write_quantized_folder(tmp_path)
    expected = MambaForCausalLM.from_pretrained(tmp_path)(IDS).logits
    model = MambaForCausalLM.from_pretrained(tmp_path, device_map=str(device))
    assert_same(model(IDS.to(device)).logits.cpu(), expected)


def test_adapters(device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    undo = patch_peft()
    try:
        names = ["in_proj", "x_proj", "out_proj"]
        config = peft.LoraConfig(
            target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False
        )
        adapted = peft.get_peft_model(talkative_model(), config).eval()
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        expected = adapted.generate(input_ids=IDS, pad_token_id=0, **options)
        adapted.to(device)
        found = adapted.generate(input_ids=IDS.to(device), pad_token_id=0, **options)
        assert torch.equal(found.cpu(), expected)
        merged = adapted.merge_and_unload()
        found = merged.generate(IDS.to(device), pad_token_id=0, **options)
        assert torch.equal(found.cpu(), expected)
    finally:
        undo()


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@torch.no_grad()
def test_the_drop_in(layer: str, device: torch.device) -> None:
    from anymamba.dropin.mamba_ssm.models.config_mamba import MambaConfig as OriginalConfig
    from anymamba.dropin.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    settings = {"layer": layer} | ({"headdim": 16} if layer == "Mamba2" else {})
    config = OriginalConfig(d_model=32, n_layer=2, vocab_size=61, ssm_cfg=settings)
    torch.manual_seed(0)
    model = MambaLMHeadModel(config)
    logits, text = model(IDS).logits, model.generate(IDS, max_length=16)
    model.to(device)
    assert_same(model(IDS.to(device)).logits.cpu(), logits)
    assert torch.equal(model.generate(IDS.to(device), max_length=16).cpu(), text)


def test_the_drop_in_beside_the_real_scan(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("mamba_ssm's kernels are for GPUs")
    real = pytest.importorskip(
        "mamba_ssm.ops.selective_scan_interface",
        reason="needs mamba_ssm; pip install mamba-ssm causal-conv1d",
    )
    from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    source = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(device).requires_grad_()

    u, delta, z = leaf(2, 24, 70), leaf(2, 24, 70), leaf(2, 24, 70)
    A, B, C, D = leaf(24, 8), leaf(2, 8, 70), leaf(2, 8, 70), leaf(24)
    given = (u, delta, -A.exp(), B, C, D, z, leaf(24), True)
    ours, theirs = selective_scan_fn(*given), real.selective_scan_fn(*given)
    assert_same(ours.detach().cpu(), theirs.detach().cpu())
    leaves = (u, delta, A, B, C, D, z)
    one = torch.autograd.grad(ours.square().sum(), leaves, retain_graph=True)
    other = torch.autograd.grad(theirs.square().sum(), leaves)
    for found, expected in zip(one, other, strict=True):
        assert_same(found.cpu(), expected.cpu(), 1e-3)


def test_the_command(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--max-new-tokens", "9", "--temperature", "0", "ROMEO:"]
    assert main([*arguments, "--device", "cpu"]) == 0
    expected = capsys.readouterr().out
    assert main([*arguments, "--device", device.type]) == 0
    assert capsys.readouterr().out == expected
