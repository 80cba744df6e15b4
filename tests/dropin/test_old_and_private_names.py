"""Names that programs import beside the documented ones: of version 1, private ones, forks'."""

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba import dropin
from anymamba.dropin.mamba_ssm.distributed import distributed_utils, tensor_parallel
from anymamba.dropin.mamba_ssm.modules.block import Block as BlockOfVersion2
from anymamba.dropin.mamba_ssm.modules.mamba_simple import Block, Mamba
from anymamba.dropin.mamba_ssm.ops.triton import (
    k_activations,
    layer_norm,
    layernorm,
    layernorm_gated,
    ssd_combined,
)
from anymamba.errors import ArgumentError, MissingModuleError, NotIncludedError
from anymamba.upstream import NAMES
from tests.support.tolerance import assert_contract, assert_each, assert_gradient


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dropin, "_warn_of_models_imported_before", lambda: None)
    dropin.install()
    yield
    dropin.uninstall()
    assert not any(name in __import__("sys").modules for name in NAMES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_norms_of_version_1_take_their_arguments_in_its_order() -> None:
    x, residual, weight, bias = draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(8), draw(8, seed=2)
    found = layernorm.layer_norm_fn(x, weight, bias, residual, 0.3, True, True, True)
    options = {"eps": 0.3, "prenorm": True, "residual_in_fp32": True, "is_rms_norm": True}
    expected = layer_norm.layer_norm_fn(x, weight, bias, residual, **options)
    assert_each(torch.equal, found, expected)
    found = layernorm.rms_norm_fn(x, weight, None, residual, True, False, 0.3)
    expected = layer_norm.rms_norm_fn(x, weight, None, residual, eps=0.3, prenorm=True)
    assert_each(torch.equal, found, expected)
    # Arguments of version 2 count by their names, and unknown ones are refused.
    twice, other = layernorm.layer_norm_fn(x, weight, bias, weight1=2 * weight, bias1=2 * bias)
    assert torch.allclose(2 * twice, other)
    with pytest.raises(ArgumentError, match="no_such"):
        layernorm.rms_norm_fn(x, weight, None, no_such=1)
    plain = F.layer_norm(x, x.shape[-1:], weight, bias, 0.3)
    assert_contract(layernorm.layer_norm_ref(x, weight, bias, None, 0.3), plain)
    assert layernorm.RMSNorm is layer_norm.RMSNorm


@pytest.mark.parametrize("fused", [False, True])
def test_the_block_of_version_1_is_one_without_an_mlp(fused: bool) -> None:
    torch.manual_seed(0)
    block = Block(16, partial(Mamba, layer_idx=0), layer_norm.RMSNorm, fused, True)
    of_2 = BlockOfVersion2(16, Mamba, nn.Identity, layer_norm.RMSNorm, fused, True)
    of_2.load_state_dict(block.state_dict())
    assert_each(torch.equal, block(draw(1, 5, 16)), of_2(draw(1, 5, 16)))
    assert not any("norm2" in name for name in block.state_dict())


GATED = [
    {"is_rms_norm": True},
    {"group_size": 4, "norm_before_gate": False, "is_rms_norm": True},
    {"group_size": 2},
]


@pytest.mark.parametrize("options", GATED)
@pytest.mark.parametrize("gated", [False, True])
def test_the_gated_norms_passes(options: dict[str, Any], gated: bool) -> None:
    x, weight, bias, dy = draw(6, 8), draw(8, seed=1), draw(8, seed=2), draw(6, 8, seed=4)
    z = draw(6, 8, seed=3) if gated else None
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias, z)]
    expected = layernorm_gated.layernorm_fn(*leaves, eps=0.1, **options)
    y, mean, rstd = layernorm_gated._layer_norm_fwd(x, weight, bias, 0.1, z, **options)
    assert_contract(y, expected)
    rows = x if z is None or options.get("norm_before_gate", True) else x * F.silu(z)
    groups = rows.unflatten(1, (-1, options.get("group_size", 8)))
    # All rows of a group stand together.
    if options.get("is_rms_norm"):
        assert mean is None
        assert_contract(rstd, torch.rsqrt(groups.square().mean(-1) + 0.1).mT.flatten())
    else:
        assert_contract(mean, groups.mean(-1).mT.flatten())
        deviation = torch.sqrt(groups.var(-1, unbiased=False) + 0.1)
        assert_contract(rstd, (1 / deviation).mT.flatten())
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(expected, wanted, dy.double())
    found = layernorm_gated._layer_norm_bwd(
        dy, x, weight, bias, 0.1, mean, rstd, z, recompute_output=True, **options
    )
    assert_contract(found[4], expected)
    assert (found[3] is None) == (z is None)
    assert_each(assert_gradient, [f for f in found[:4] if f is not None], gradients)


def test_the_activations_passes() -> None:
    xy, dout = draw(2, 3, 8), draw(2, 3, 4, seed=1)
    x, y = xy.double().requires_grad_().chunk(2, -1)
    place = torch.empty(2, 3, 4)
    assert k_activations._swiglu_fwd(xy, place) is place
    assert_contract(place, F.silu(x) * y)
    leaf = xy.double().requires_grad_()
    x, y = leaf.chunk(2, -1)
    (expected,) = torch.autograd.grad(F.silu(x) * y, leaf, dout.double())
    gradient, out = k_activations._swiglu_bwd(xy, dout, recompute_output=True)
    assert_gradient(gradient, expected)
    assert_contract(out, F.silu(x) * y)


@pytest.mark.parametrize("packed", [False, True])
def test_the_chunk_scans_passes(packed: bool) -> None:
    b, l, h, p, n, chunk = 1, 11, 4, 3, 5, 4
    call = [draw(b, l, h, p), draw(b, l, h, seed=1), -draw(h, seed=2).exp()]
    call += [draw(b, l, 2, n, seed=3), draw(b, l, 2, n, seed=4)]
    options = {"D": draw(h, seed=5), "z": draw(b, l, h, p, seed=6), "dt_bias": draw(h, seed=7)}
    options["initial_states"] = draw(b, h, p, n, seed=8)
    # The second sequence begins inside of a chunk, the third with one.
    seq_idx = torch.tensor([[0] * 3 + [1] * 5 + [2] * 3], dtype=torch.int32) if packed else None
    plain: dict[str, Any] = {"seq_idx": seq_idx, "dt_softplus": True, "dt_limit": (0.1, 1.0)}

    def scan(*tensors: Tensor, until: int = l) -> Any:
        inputs = [t if i == 2 else t[:, :until] for i, t in enumerate(tensors[:5])]
        D, z, dt_bias, states = tensors[5:]
        more = dict(plain, seq_idx=None if seq_idx is None else seq_idx[:, :until])
        return ssd_combined.mamba_chunk_scan_combined(
            *inputs, chunk, D, z[:, :until], dt_bias, states, return_final_states=True, **more
        )

    leaves = [t.double().requires_grad_() for t in (*call, *options.values())]
    expected, last = scan(*leaves)
    out, out_x, dt, sums, states, final = ssd_combined._mamba_chunk_scan_combined_fwd(
        *call, chunk, **options, **plain
    )
    assert_contract(out, expected)
    assert_contract(out_x * F.silu(options["z"]), expected)
    assert_contract(final, last)
    steps = F.softplus(call[1] + options["dt_bias"]).clamp(0.1, 1.0)
    assert dt.shape == sums.shape == (b, h, 3, chunk)
    assert_contract(dt.flatten(2)[..., :l], steps.mT)
    assert_contract(sums[0, :, 0, 2], (steps[0, :3].sum(0) * call[2]))
    assert_contract(states[:, 0], options["initial_states"])
    for index in (1, 2):
        assert_contract(states[:, index], scan(*leaves, until=chunk * index)[1])

    dout, dfinal = draw(*out.shape, seed=9), draw(*final.shape, seed=10)
    gradients = torch.autograd.grad([expected, last], leaves, [dout.double(), dfinal.double()])
    dx = torch.empty_like(call[0])
    found = ssd_combined._mamba_chunk_scan_combined_bwd(
        dout, *call, out, chunk, **options, dfinal_states=dfinal, dx=dx, recompute_output=True,
        **plain,
    )  # fmt: skip
    assert found[0] is dx
    assert_contract(found[9], expected)
    assert_each(assert_gradient, found[:9], gradients)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("from mamba_ssm.ops.triton.ssd_combined import _no_such_launcher", "_no_such_launcher"),
        ("from mamba_ssm.modules.mamba_simple import NoSuchLayer", "NoSuchLayer"),
        ("from selective_scan_cuda import fwd_of_a_fork", "fwd_of_a_fork"),
        (
            "from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj",
            "Vision Mamba",
        ),
        ("from mamba_ssm import Mamba; Mamba(16, bimamba_type='v2')", "Vision Mamba"),
        ("from mamba_ssm import Mamba; Mamba(16, nslices=4)", "SegMamba"),
        ("from mamba_ssm import Mamba2; Mamba2(16, no_such=4)", "no_such"),
        ("from mamba_ssm.models.mixer_seq_simple import create_block; create_block(16)", "d_inter"),
        (
            "from mamba_ssm import selective_scan_fn; selective_scan_fn(1, 2, 3, 4, 5, rows=2)",
            "rows",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_name(statement: str, says: str, installed: None) -> None:
    with pytest.raises((MissingModuleError, ArgumentError), match=says) as caught:
        exec(statement, {})
    assert "AnyMamba" in str(caught.value)
    assert "docs/drop-in.md" in str(caught.value)


def test_an_error_within_a_call_stays_what_it_is() -> None:
    def broken(width: int) -> nn.Module:
        raise TypeError("the program's own mistake")

    with pytest.raises(TypeError, match="own mistake") as caught:
        Block(16, broken)
    assert not isinstance(caught.value, ArgumentError)


def test_probing_finds_nothing(installed: None) -> None:
    assert not hasattr(importlib.import_module("mamba_ssm.modules.mamba_simple"), "NoSuchLayer")


@pytest.mark.parametrize("name", ["modules.mamba_simple", "ops.selective_scan_interface"])
def test_names_of_einops_are_there_where_the_original_has_them(name: str, installed: None) -> None:
    module = importlib.import_module(f"mamba_ssm.{name}")
    try:
        import einops
    except ImportError:
        with pytest.raises(ImportError, match="pip install einops"):
            module.rearrange(torch.ones(2, 3), "a b -> b a")
    else:
        assert module.repeat(torch.ones(2), "a -> a b", b=3).shape == (2, 3)
        assert einops.rearrange(torch.ones(2, 3), "a b -> b a").shape == (3, 2)


@pytest.mark.parametrize("name", tensor_parallel.__all__)
def test_split_layers_can_be_imported_and_not_made(name: str) -> None:
    with pytest.raises(NotIncludedError, match=rf"{name}.*AnyMamba"):
        getattr(tensor_parallel, name)(4, 4, process_group=object())


@pytest.mark.parametrize("name", distributed_utils.__all__)
def test_functions_of_several_processes_can_be_imported_and_not_called(name: str) -> None:
    with pytest.raises(NotIncludedError, match=rf"{name}.*AnyMamba"):
        getattr(distributed_utils, name)(torch.ones(1), None)
