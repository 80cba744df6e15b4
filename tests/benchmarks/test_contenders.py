"""All contenders have the same weights: they must say the same, or the times mean nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from common.shapes import Shape
from contenders import registry
from contenders.anymamba_model import AnyMamba, random_model
from contenders.interface import Contender, TorchContender
from torch import Tensor

SHAPE = Shape(vocab_size=64, hidden_size=32, num_hidden_layers=2)
# The project's figure for whole models in float32; float16 has 10 bits of mantissa, and llama.cpp
# rounds activations to it too.
TOLERANCE = {"llama.cpp f16": 1e-2}


@pytest.fixture(scope="module")
def ours() -> AnyMamba:
    model = random_model(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():  # no bias zero, no norm weight one
            parameter += 0.2 * torch.randn_like(parameter)
    return AnyMamba(model)


@pytest.fixture
def ids_bl() -> Tensor:
    return torch.randint(SHAPE.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))


def built(name: str, source: Any, folder: Path) -> Contender:
    if (reason := registry.PEERS[name].missing()) is not None:
        pytest.skip(reason)
    return registry.Peers(SHAPE, source, True, folder).build(name)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest value expected."""
    return float(((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).detach())


@pytest.mark.parametrize("name", registry.PEERS)
def test_a_peer_says_what_anymamba_says(
    name: str, ours: AnyMamba, ids_bl: Tensor, tmp_path: Path
) -> None:
    peer = built(name, ours.model, tmp_path)
    expected = ours.logits(ids_bl)[:, -1]
    tolerance = TOLERANCE.get(name, 1e-4)
    assert distance(peer.prefill(ids_bl), expected) < tolerance
    assert distance(peer.decode(ids_bl), expected) < tolerance
    if isinstance(peer, TorchContender):
        peer.model.train()
        loss = peer.train_step(ids_bl)
        assert distance(loss, ours.loss(ids_bl)) < tolerance
        assert all(weight.grad is not None for weight in peer.model.parameters())
        peer.forget_gradients()
        assert all(weight.grad is None for weight in peer.model.parameters())


def test_anymamba_says_the_same_however_it_is_asked(ours: AnyMamba, ids_bl: Tensor) -> None:
    expected = ours.logits(ids_bl)[:, -1]
    assert distance(ours.prefill(ids_bl), expected) < 1e-4
    assert distance(ours.decode(ids_bl), expected) < 1e-4
    assert ours.generate(ids_bl, 3).shape == (1, 27)
    narrow = AnyMamba(ours.model, torch.bfloat16)
    assert distance(narrow.decode(ids_bl), expected) < 5e-2
    assert ours.model.dtype is torch.float32  # the copy is the one that changed


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_a_gguf_file_holds_the_weights(kind: str, ours: AnyMamba, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from common.gguf_file import write_gguf

    path = tmp_path / "model.gguf"
    write_gguf(ours.model, path, kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert "output.weight" not in tensors  # the head is tied
    assert len(tensors) == 2 + 10 * SHAPE.num_hidden_layers
    mixer = ours.model.backbone.layers[1].mixer
    expected = -torch.exp(mixer.A_log.detach().double()).float()
    assert torch.equal(torch.tensor(tensors["blk.1.ssm_a"].data), expected)
    stored = tensors["blk.1.ssm_in.weight"]
    values = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
    error = {"f32": 0, "f16": 1e-3, "q8_0": 1e-2, "q4_0": 0.15}[kind]
    assert distance(values, mixer.in_proj.weight.detach()) <= error


def test_what_llama_cpp_cannot_express_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from common.gguf_file import write_gguf

    model = random_model(Shape(vocab_size=64, hidden_size=32, num_hidden_layers=1, expand=3))
    with pytest.raises(ValueError, match="expand=2"):
        write_gguf(model, tmp_path / "model.gguf")
