"""The inside of a Mamba block in one call, against Transformers' own classes and small formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.dropin.mamba_ssm.ops.selective_scan_interface import (
    MambaInnerFn,
    mamba_inner_fn,
    mamba_inner_ref,
)
from anymamba.errors import InputError
from tests.support.tolerance import assert_contract, assert_gradient

NAMES = "conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A"
b, d, e, l, n, rank = 2, 5, 6, 9, 4, 3


def inputs(is_complex: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=g, dtype=dtype)

    numbers = 2 * n if is_complex else n
    A = -torch.rand(e, n, generator=g, dtype=dtype) * n
    return {
        "xz": normal(b, 2 * e, l),
        "conv1d_weight": normal(e, 1, 4),
        "conv1d_bias": normal(e),
        "x_proj_weight": normal(rank + 2 * numbers, e),
        "delta_proj_weight": normal(e, rank),
        "out_proj_weight": normal(d, e),
        "out_proj_bias": normal(d),
        "A": torch.complex(A, normal(e, n)) if is_complex else A,
        "D": normal(e),
        "delta_bias": normal(e),
    }


def step_by_step(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | float = 0.0,
    C_proj_bias: Tensor | float = 0.0,
    norms: tuple[Tensor, Tensor, Tensor, float] | None = None,
) -> Tensor:
    """The paper's block, one position after the other."""
    x, z = xz[:, :e], xz[:, e:]
    padded = F.pad(x, (conv1d_weight.shape[2] - 1, 0))
    x = F.silu(F.conv1d(padded, conv1d_weight, conv1d_bias, groups=e))
    state, outputs = torch.zeros(b, e, n, dtype=A.dtype), []
    for t in range(l):
        low = x[:, :, t] @ x_proj_weight.T
        numbers = (low.shape[1] - rank) // 2
        delta = low[:, :rank] @ delta_proj_weight.T
        maps = [low[:, rank : rank + numbers] + B_proj_bias, low[:, -numbers:] + C_proj_bias]
        if norms is not None:
            maps = [rms(maps[0], norms[0], norms[3]), rms(maps[1], norms[1], norms[3])]
            delta = rms(delta, norms[2], norms[3])
        if A.is_complex():
            maps = [torch.complex(m[:, 0::2], m[:, 1::2]) for m in maps]
        B_ben = B if B is not None else maps[0][:, None]
        C_ben = C if C is not None else maps[1][:, None]
        step = F.softplus(delta if delta_bias is None else delta + delta_bias)[..., None]
        state = torch.exp(step * A) * state + step * B_ben * x[:, :, t, None]
        y = (state * C_ben).sum(-1)
        y = 2 * y.real if A.is_complex() else y
        y = y if D is None else y + D * x[:, :, t]
        outputs.append(F.linear(y * F.silu(z[:, :, t]), out_proj_weight, out_proj_bias))
    return torch.stack(outputs, 1)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("function", [mamba_inner_fn, mamba_inner_ref])
def test_equals_the_block_step_by_step(function: Any, is_complex: bool) -> None:
    call = inputs(is_complex)
    # Five operators one after the other make a model: 1e-4.
    assert_contract(function(**call), step_by_step(**call), factor=10)
    channel_last = call | {"xz": call["xz"].mT.contiguous().mT}
    assert_contract(function(**channel_last), step_by_step(**call), factor=10)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("function", [mamba_inner_fn, mamba_inner_ref])
def test_B_and_C_may_be_given_or_have_biases(function: Any, is_complex: bool) -> None:
    call = inputs(is_complex)
    constant = {"B": torch.randn(e, n, dtype=call["A"].dtype)}
    bias = {"C_proj_bias": torch.randn(2 * n if is_complex else n)}
    call |= constant | bias
    assert_contract(function(**call), step_by_step(**call), factor=10)


def test_norms_of_the_step_and_the_maps() -> None:
    call = inputs()
    gains = (torch.rand(n) + 0.5, torch.rand(n) + 0.5, torch.rand(e) + 0.5, 1e-3)
    names = ("b_rms_weight", "c_rms_weight", "dt_rms_weight", "b_c_dt_rms_eps")
    out = mamba_inner_fn(**call, **dict(zip(names, gains, strict=True)))
    assert_contract(out, step_by_step(**call, norms=gains), factor=10)


def test_every_input_has_a_gradient() -> None:
    call = inputs()
    call |= {"B_proj_bias": torch.randn(n), "C_proj_bias": torch.randn(n)}
    gains = (torch.rand(n) + 0.5, torch.rand(n) + 0.5, torch.rand(e) + 0.5)
    call |= dict(zip(("b_rms_weight", "c_rms_weight", "dt_rms_weight"), gains, strict=True))
    single = {name: value.requires_grad_() for name, value in call.items()}
    double = {k: v.detach().double().requires_grad_() for k, v in single.items()}
    mamba_inner_fn(**single).sin().sum().backward()
    norms = tuple(double[k] for k in ("b_rms_weight", "c_rms_weight", "dt_rms_weight"))
    plain = {k: v for k, v in double.items() if "rms" not in k}
    step_by_step(**plain, norms=(*norms, 1e-6)).sin().sum().backward()
    for name, value in single.items():
        assert value.grad is not None, name
        assert_gradient(value.grad, double[name].grad)


def test_bfloat16_and_a_wider_bias_of_the_last_projection() -> None:
    call = {k: v if k in ("A", "D", "delta_bias") else v.bfloat16() for k, v in inputs().items()}
    call["out_proj_bias"] = call["out_proj_bias"].float()
    out = mamba_inner_fn(**call)
    assert out.dtype == torch.bfloat16
    assert_contract(out, step_by_step(**{k: v.float() for k, v in call.items()}))


def test_autocast_is_followed() -> None:
    call = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**call)
    assert out.dtype == torch.bfloat16
    assert_contract(out, step_by_step(**call))


def test_the_autograd_functions_name_is_the_function() -> None:
    call = inputs()
    arguments = [call.get(name) for name in f"xz {NAMES} B C D delta_bias".split()]
    assert torch.equal(MambaInnerFn.apply(*arguments), mamba_inner_fn(**call))


def test_it_is_transformers_mamba_block() -> None:
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    mixer = (
        MambaModel(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=3, state_size=n))
        .layers[0]
        .mixer
    )
    hidden = torch.randn(2, 7, 8)
    out = mamba_inner_fn(
        mixer.in_proj(hidden).mT,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.out_proj.weight,
        mixer.out_proj.bias,
        -torch.exp(mixer.A_log.float()),
        D=mixer.D.float(),
        delta_bias=mixer.dt_proj.bias.float(),
    )
    assert_contract(out, mixer.eval()(hidden), factor=10)


def test_bad_calls_say_what_is_wrong() -> None:
    call = inputs()
    with pytest.raises(InputError, match="expected xz of shape"):
        mamba_inner_fn(**call | {"xz": call["xz"][:, :e]})
    with pytest.raises(InputError, match="checkpoint_lvl is 2"):
        mamba_inner_fn(**call, checkpoint_lvl=2)
    with pytest.raises(InputError, match="leave out its norm"):
        mamba_inner_fn(**call, B=torch.ones(e, n), b_rms_weight=torch.ones(n))
