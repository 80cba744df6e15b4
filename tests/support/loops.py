"""The layers as loops over time: slow, plain, and independent of what they are compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.tolerance import assert_layer, naming


def convolution(conv1d: Any, x_ble: Tensor, starts: set[int]) -> Tensor:
    """Each output sums the last k inputs since the last of the starts, in float64 or wider."""
    weight_ek = conv1d.weight[:, 0].double()
    k = weight_ek.shape[1]
    rows = []
    begin = 0
    for t in range(x_ble.shape[1]):
        begin = t if t in starts else begin
        y_be = torch.zeros_like(x_ble[:, 0])
        for j in range(k):
            past = t - (k - 1) + j
            if past >= begin:
                y_be = y_be + weight_ek[:, j] * x_ble[:, past]
        rows.append(y_be if conv1d.bias is None else y_be + conv1d.bias.double())
    return torch.stack(rows, dim=1)


def linear(layer: Any, x: Tensor) -> Tensor:
    y = x @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


def mamba(layer: Any, u_bld: Tensor) -> Tensor:
    """A Mamba layer, computed in float64."""
    x_ble, z_ble = linear(layer.in_proj, u_bld.double()).chunk(2, dim=-1)
    x_ble = F.silu(convolution(layer.conv1d, x_ble, {0}))
    r, n = layer.dt_proj.in_features, layer.A_log.shape[1]
    low_rank, B_bln, C_bln = (x_ble @ layer.x_proj.weight.double().T).split([r, n, n], dim=-1)
    delta_ble = F.softplus(linear(layer.dt_proj, low_rank))
    A_en = -layer.A_log.double().exp()
    state_ben = torch.zeros(*x_ble.shape[::2], n, dtype=torch.float64)
    rows = []
    for t in range(x_ble.shape[1]):
        delta = delta_ble[:, t, :, None]
        input_ben = delta * x_ble[:, t, :, None] * B_bln[:, t, None, :]
        state_ben = (delta * A_en).exp() * state_ben + input_ben
        y_be = (state_ben * C_bln[:, t, None, :]).sum(-1) + layer.D.double() * x_ble[:, t]
        rows.append(y_be * F.silu(z_ble[:, t]))
    return linear(layer.out_proj, torch.stack(rows, dim=1))


def mamba2(
    layer: Any,
    u_bld: Tensor,
    starts: tuple[int, ...] = (),
    d_ssm: int | None = None,
    first_state: Tensor | None = None,
) -> Tensor:
    """A Mamba-2 layer, computed in float64; state and convolution begin anew at each start."""
    g, n, p, h = layer.ngroups, layer.d_state, layer.headdim, layer.nheads
    s = layer.d_inner if d_ssm is None else d_ssm
    m = layer.d_inner - s
    projected = linear(layer.in_proj, u_bld.double())
    gate, mlp, z_bls, xBC, dt_blh = projected.split([m, m, s, s + 2 * g * n, h], dim=-1)
    xBC = F.silu(convolution(layer.conv1d, xBC, {0, *starts}))
    x_bls, B, C = xBC.split([s, g * n, g * n], dim=-1)
    dt_blh = F.softplus(dt_blh + layer.dt_bias.double()).clamp(*layer.dt_limit)
    A_h = -layer.A_log.double().exp()
    D_hp = layer.D.double().view(h, -1).expand(h, p)
    b, l = u_bld.shape[:2]
    zero = torch.zeros(b, h, p, n, dtype=torch.float64)
    state = zero if first_state is None else first_state.double().expand(b, h, p, n)
    rows = []
    for t in range(l):
        state = zero if t in starts else state
        x_bhp = x_bls[:, t].view(b, h, p)
        B_bhn = B[:, t].view(b, g, n).repeat_interleave(h // g, dim=1)
        C_bhn = C[:, t].view(b, g, n).repeat_interleave(h // g, dim=1)
        dt_bh = dt_blh[:, t]
        update = dt_bh[..., None, None] * x_bhp[..., None] * B_bhn[:, :, None]
        state = (dt_bh * A_h).exp()[..., None, None] * state + update
        rows.append(((state * C_bhn[:, :, None]).sum(-1) + D_hp * x_bhp).reshape(b, s))
    y_bls = gated_norm(layer, torch.stack(rows, dim=1), z_bls)
    return linear(layer.out_proj, torch.cat([F.silu(gate) * mlp, y_bls], dim=-1))


def gated_norm(layer: Any, y: Tensor, z: Tensor) -> Tensor:
    """Gate, and norm in groups unless the layer has no norm."""
    if not getattr(layer, "rmsnorm", True):
        return y * F.silu(z)
    before = getattr(layer, "norm_before_gate", False)
    y = y if before else y * F.silu(z)
    groups = y.unflatten(-1, (layer.ngroups, -1))
    groups = groups / (groups.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    y = groups.flatten(-2) * layer.norm.weight.double()
    return y * F.silu(z) if before else y


def rotated(heads_blhp: Tensor, dim: int, base: float, interleaved: bool) -> Tensor:
    """Pairs of channels as complex numbers, turned one by one."""
    out = heads_blhp.clone()
    for t in range(heads_blhp.shape[1]):
        for i in range(dim // 2):
            pair = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
            angle = torch.tensor(t * base ** (-2 * i / dim), dtype=torch.float64)
            number = torch.complex(heads_blhp[:, t, :, pair[0]], heads_blhp[:, t, :, pair[1]])
            number = number * torch.polar(torch.ones_like(angle), angle)
            out[:, t, :, pair[0]], out[:, t, :, pair[1]] = number.real, number.imag
    return out


def attention(layer: Any, x_bld: Tensor) -> Tensor:
    """An MHA layer, one query and one head at a time, in float64."""
    p, h, kv = layer.head_dim, layer.num_heads, layer.num_heads_kv
    b, l = x_bld.shape[:2]
    qkv, mlp = linear(layer.in_proj, x_bld.double()).split([p * (h + 2 * kv), layer.mlp_dim], -1)
    if layer.d_conv:
        qkv = convolution(layer.conv1d, qkv, {0})
    q, k, v = (part.view(b, l, -1, p) for part in qkv.split([h * p, kv * p, kv * p], dim=-1))
    if layer.rotary_emb_dim:
        turn = layer.rotary_emb
        q, k = (rotated(heads, turn.dim, turn.base, turn.interleaved) for heads in (q, k))
    scale = p**-0.5 if layer.softmax_scale is None else layer.softmax_scale
    y = torch.zeros_like(q)
    for t in range(l):
        seen = t + 1 if layer.causal else l
        for head in range(h):
            shared = head // (h // kv)
            scores = (q[:, t, None, head] * k[:, :seen, shared]).sum(-1) * scale
            y[:, t, head] = (scores.softmax(-1)[..., None] * v[:, :seen, shared]).sum(1)
    up, gate = mlp.chunk(2, dim=-1)
    return linear(layer.out_proj, torch.cat([y.flatten(-2), up * F.silu(gate)], dim=-1))


def assert_layer_gradients(
    module: nn.Module, x: Tensor, slow: Callable[[Any, Tensor], Tensor]
) -> None:
    """The gradients of input and weights are those of a loop."""
    results = []
    for run in (module, lambda u: slow(module, u)):
        u = x.detach().clone().requires_grad_()
        module.zero_grad()
        y = run(u)
        # A fixed weighting, so that no gradient cancels.
        (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
        named = {
            name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
        }
        results.append({"input": u.grad, **named})
    fast, loop = results
    assert fast.keys() == loop.keys()
    for name in fast:
        with naming(f"the gradient of {name}"):
            assert_layer(fast[name], loop[name])
