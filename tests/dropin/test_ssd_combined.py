"""Mamba-2's functions against plain loops, against each other, and against Transformers' layer."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from anymamba.dropin.mamba_ssm.modules import ssd_minimal
from anymamba.dropin.mamba_ssm.ops.triton import ssd_combined
from anymamba.errors import InputError
from tests.support.tolerance import assert_contract


def normal(*shape: int) -> Tensor:
    """Deterministic numbers in float64, so that comparisons show formulas and not rounding."""
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def scan_arguments(b: int, l: int, h: int, p: int, g: int, n: int) -> dict[str, Any]:
    """The tensors of `mamba_chunk_scan_combined`."""
    return {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h),
        "A": -normal(h).abs(),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n + 1)[..., 1:],
        "chunk_size": 256,
        "D": normal(h, p),
        "z": normal(b, l, h, p) + 1,
        "dt_bias": normal(h) - 1,
        "dt_softplus": True,
    }


def by_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    limit: tuple[float, float] = (0.0, math.inf),
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """All rows side by side, one step after the other."""
    b, l, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1]) if state is None else state
    B, C = (m.repeat_interleave(h // B.shape[2], 2) for m in (B, C))
    steps = F.softplus(dt + dt_bias).clamp(*limit)
    outputs = []
    for t in range(l):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        drive = torch.einsum("bh,bhp,bhn->bhpn", steps[:, t], x[:, t], B[:, t])
        state = torch.exp(steps[:, t] * A)[..., None, None] * state + drive
        y = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        y = y + (D if D.ndim == 2 else D[:, None]) * x[:, t]
        outputs.append(y if z is None else y * F.silu(z[:, t]))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1, 1), (2, 70, 4, 3, 2, 5)])
def test_the_combined_scan(size: tuple[int, ...]) -> None:
    given = scan_arguments(*size)
    b, l, h, p, _, n = size
    states, seq_idx = normal(b, h, p, n), torch.arange(l).expand(b, l) // 9
    out, last = ssd_combined.mamba_chunk_scan_combined(
        **given,
        initial_states=states,
        seq_idx=seq_idx,
        dt_limit=(0.1, 1.0),
        return_final_states=True,
    )
    expected, expected_last = by_loop(**given, limit=(0.1, 1.0), state=states, seq_idx=seq_idx)
    assert_contract(out, expected)
    assert_contract(last, expected_last)


def test_without_options_only_the_output_comes_back() -> None:
    given = scan_arguments(1, 9, 4, 3, 1, 2) | {"D": normal(4), "z": None}
    expected, _ = by_loop(**given)
    assert_contract(ssd_combined.mamba_chunk_scan_combined(**given), expected)
    assert_contract(ssd_combined.mamba_chunk_scan(**given), expected)
    assert_contract(ssd_combined.ssd_chunk_scan_combined_ref(**given), expected)
    del given["chunk_size"]
    given = {k: v.float() if isinstance(v, Tensor) else v for k, v in given.items()}
    assert_contract(ssd_combined.ssd_selective_scan(**given), expected)


@pytest.mark.parametrize("seq_idx_given", [True, False])
@pytest.mark.parametrize("initial_states", [True, False])
@pytest.mark.parametrize("lengths", [[5, 1, 3], [9], [4, 0, 5], [9, 0], [0, 9]])
def test_states_of_packed_sequences(
    seq_idx_given: bool, initial_states: bool, lengths: list[int]
) -> None:
    given = scan_arguments(1, 9, 2, 3, 1, 4)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    marks = seq_idx if seq_idx_given else None
    state = normal(1, 2, 3, 4) if initial_states else None
    out, last, varlen = ssd_combined.mamba_chunk_scan_combined(
        **given,
        initial_states=state,
        seq_idx=marks,
        cu_seqlens=offsets,
        return_final_states=True,
        return_varlen_states=True,
    )
    expected, expected_last = by_loop(**given, state=state, seq_idx=marks)
    assert_contract(out, expected)
    assert_contract(last, expected_last)
    for index, (start, length) in enumerate(zip(offsets[:-1], lengths, strict=True)):
        if not length:
            assert not varlen[index].any()
            continue
        alone = dict(given)
        for name in ("x", "dt", "B", "C", "z"):
            alone[name] = given[name][:, start : start + length]
        assert_contract(varlen[index], by_loop(**alone)[1][0])
    _, again = ssd_combined.mamba_chunk_scan_combined(
        **given, seq_idx=marks, cu_seqlens=offsets, return_varlen_states=True
    )
    assert torch.equal(again, varlen)


def test_the_scan_by_channels_takes_more_forms() -> None:
    b, l, h, p, n = 2, 11, 2, 3, 4
    given = scan_arguments(b, l, h, p, 2, n)
    x, dt, B, C = given["x"], normal(b, l, h, p), given["B"], given["C"]
    A, bias, D, z = -normal(h * p, n).abs(), normal(h, p), normal(h, p), given["z"]
    single = [t.float() for t in (x, dt, A, B, C, D, z, bias)]
    found = ssd_combined.ssd_selective_scan(*single, dt_softplus=True, dt_limit=(0.2, 0.9))
    steps = F.softplus(dt + bias).clamp(0.2, 0.9)
    state = x.new_zeros(b, h, p, n)
    for t in range(l):
        decay = torch.exp(steps[:, t, :, :, None] * A.view(h, p, n))
        state = decay * state + (steps * x)[:, t, :, :, None] * B[:, t, :, None]
        y = (state * C[:, t, :, None]).sum(-1) + D * x[:, t]
        assert_contract(found[:, t], y * F.silu(z[:, t]))


def layer_arguments(
    *, b: int = 2, l: int = 13, h: int = 4, p: int = 3, g: int = 2, n: int = 3, mlp: int = 0
) -> dict[str, Any]:
    """The tensors of `mamba_split_conv1d_scan_combined`."""
    dim, convolved = h * p, h * p + 2 * g * n
    return {
        "zxbcdt": normal(b, l, 2 * mlp + dim + convolved + h),
        "conv1d_weight": normal(convolved, 4),
        "conv1d_bias": normal(convolved),
        "dt_bias": normal(h) - 1,
        "A": -normal(h).abs(),
        "D": normal(h),
        "chunk_size": 256,
        "rmsnorm_weight": normal(dim) + 1,
        "outproj_weight": normal(5, dim + mlp),
        "outproj_bias": normal(5),
        "headdim": p,
        "ngroups": g,
    }


def layer_by_loop(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    rmsnorm_weight: Tensor | None,
    outproj_weight: Tensor | None,
    outproj_bias: Tensor | None,
    headdim: int | None,
    ngroups: int,
    mlp: int = 0,
    norm_before_gate: bool = True,
    norm_groups: int | None = None,
    activation: str | None = "silu",
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The layer in small steps of PyTorch's own functions."""
    h, p = D.shape[0], headdim or D.shape[1]
    dim, convolved = h * p, conv1d_weight.shape[0]
    up, gate, z, xBC, dt = zxbcdt.split([mlp, mlp, dim, convolved, h], dim=-1)
    window = torch.zeros_like(xBC)
    for back in range(4):
        earlier = F.pad(xBC, (0, 0, back, 0))[:, : xBC.shape[1]]
        if seq_idx is not None:
            same = F.pad(seq_idx, (back, 0), value=-7)[:, : xBC.shape[1]] == seq_idx
            earlier = earlier * same[..., None]
        window = window + earlier * conv1d_weight[:, 3 - back]
    xBC = window + conv1d_bias
    xBC = xBC if activation is None else F.silu(xBC)
    maps = (convolved - dim) // 2
    x, B, C = xBC.split([dim, maps, maps], dim=-1)
    y, last = by_loop(
        x.unflatten(-1, (h, p)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        D=D,
        z=None,
        dt_bias=dt_bias,
        state=state,
        seq_idx=seq_idx,
    )
    y, gated = y.flatten(2), F.silu(z)
    if rmsnorm_weight is None:
        y = y * gated
    else:
        y = y if norm_before_gate else y * gated
        groups = y.unflatten(-1, (norm_groups or ngroups, -1))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-6)
        y = (groups * scale).flatten(2) * rmsnorm_weight
        y = y * gated if norm_before_gate else y
    y = torch.cat([F.silu(up) * gate, y], -1)
    return (y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)), last


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_before_gate": False},
        {"rmsnorm_weight": None},
        {"outproj_weight": None, "outproj_bias": None},
        {"activation": None},
        {"D": normal(4, 3), "headdim": None},
    ],
)
@pytest.mark.parametrize("mlp", [0, 2])
def test_the_layer(change: dict[str, Any], mlp: int) -> None:
    given = layer_arguments(mlp=mlp) | change
    states, seq_idx = normal(2, 4, 3, 3), torch.arange(13).expand(2, 13) // 5
    out, last = ssd_combined.mamba_split_conv1d_scan_combined(
        **given, initial_states=states, seq_idx=seq_idx, return_final_states=True
    )
    expected, expected_last = layer_by_loop(**given, mlp=mlp, state=states, seq_idx=seq_idx)
    assert_contract(out, expected)
    assert_contract(last, expected_last)
    if mlp == 0:
        reference = ssd_combined.mamba_split_conv1d_scan_ref(**given)
        assert_contract(reference, layer_by_loop(**given, norm_groups=1)[0])


def test_gradients_of_the_layer() -> None:
    given = layer_arguments(b=1, l=5, h=2, p=2, g=1, n=2, mlp=1)
    wanted = {k: v.clone().requires_grad_() for k, v in given.items() if isinstance(v, Tensor)}

    def run(*tensors: Tensor) -> Any:
        given.update(zip(wanted, tensors, strict=True))
        return ssd_combined.mamba_split_conv1d_scan_combined(**given, return_final_states=True)

    assert torch.autograd.gradcheck(run, tuple(wanted.values()))


def test_types_are_the_original_s() -> None:
    given = {
        name: value.bfloat16() if name in ("x", "dt", "B", "C", "z") else value
        for name, value in scan_arguments(1, 70, 2, 3, 1, 4).items()
    }
    given = {
        name: value.float() if isinstance(value, Tensor) and value.dtype.itemsize == 8 else value
        for name, value in given.items()
    }
    out, last = ssd_combined.mamba_chunk_scan_combined(**given, return_final_states=True)
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    assert_contract(out, by_loop(**double)[0])
    # bfloat16 inputs, but nothing inside is rounded to bfloat16.
    assert_contract(last, by_loop(**double)[1])


@pytest.mark.parametrize("n_groups", [1, 2])
@torch.no_grad()
def test_transformers_layer(n_groups: int) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=n_groups,
        chunk_size=16,
        num_hidden_layers=1,
        use_bias=True,
    )
    mixer = Mamba2Mixer(config, 0).eval()
    hidden = torch.randn(2, 37, 16)
    ours = ssd_combined.mamba_split_conv1d_scan_combined(
        mixer.in_proj(hidden),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -torch.exp(mixer.A_log),
        mixer.D,
        chunk_size=mixer.chunk_size,
        rmsnorm_weight=mixer.norm.weight,
        rmsnorm_eps=mixer.norm.variance_epsilon,
        outproj_weight=mixer.out_proj.weight,
        outproj_bias=mixer.out_proj.bias,
        headdim=mixer.head_dim,
        ngroups=n_groups,
        norm_before_gate=False,
    )
    assert_contract(ours, mixer(hidden))


def test_the_autograd_functions_names_call_the_functions() -> None:
    given = scan_arguments(1, 5, 2, 3, 1, 4)
    in_order = [given[name] for name in ("x", "dt", "A", "B", "C", "chunk_size", "D", "z")]
    found = ssd_combined.MambaChunkScanCombinedFn.apply(*in_order, given["dt_bias"])
    expected = ssd_combined.mamba_chunk_scan_combined(**given | {"dt_softplus": False})
    assert torch.equal(found, expected)
    layer = layer_arguments()
    names = ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "chunk_size")
    rest = {"headdim": 3, "ngroups": 2}
    expected = ssd_combined.mamba_split_conv1d_scan_combined(*[layer[n] for n in names], **rest)
    apply = ssd_combined.MambaSplitConv1dScanCombinedFn.apply
    assert torch.equal(apply(*[layer[n] for n in names], **rest), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": None}, "headdim is needed"),
        ({"ngroups": 5}, "zxbcdt has shape"),
        ({"zxbcdt": normal(1, 3, 10)}, "zxbcdt has shape"),
        ({"outproj_weight": None}, "outproj_bias is given without"),
        ({"rmsnorm_weight": normal(3)}, "rmsnorm_weight has shape"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ssd_combined.mamba_split_conv1d_scan_combined(**layer_arguments() | change)


def test_states_of_packed_sequences_need_offsets() -> None:
    with pytest.raises(InputError, match="needs cu_seqlens"):
        ssd_combined.mamba_chunk_scan_combined(
            **scan_arguments(1, 3, 2, 3, 1, 4), return_varlen_states=True
        )


def test_the_reference_layer_has_no_mlp() -> None:
    with pytest.raises(InputError, match="4 columns for an MLP"):
        ssd_combined.mamba_split_conv1d_scan_ref(**layer_arguments(mlp=2))


@pytest.mark.parametrize("initial_states", [True, False])
def test_the_minimal_version(initial_states: bool) -> None:
    given = scan_arguments(2, 12, 2, 3, 2, 4)
    X, A, B, C = given["x"], -given["dt"].abs(), given["B"], given["C"]
    first = normal(2, 1, 2, 3, 4) if initial_states else None
    y, last = ssd_minimal.ssd_minimal_discrete(X, A, B, C, 4, first)
    state = torch.zeros(2, 2, 3, 4, dtype=torch.float64) if first is None else first[:, 0]
    for t in range(12):
        drive = X[:, t, :, :, None] * B[:, t, :, None]
        state = torch.exp(A[:, t])[..., None, None] * state + drive
        assert_contract(y[:, t], (state * C[:, t, :, None]).sum(-1))
    assert_contract(last, state)
    with pytest.raises(InputError, match="block_len 5 does not divide"):
        ssd_minimal.ssd_minimal_discrete(X, A, B, C, 5)
    with pytest.raises(InputError, match="of one type"):
        ssd_minimal.ssd_minimal_discrete(X, A.float(), B, C, 4)


def test_sums_over_stretches() -> None:
    x = normal(2, 5)
    for segsum in (ssd_minimal.segsum, ssd_minimal.segsum_unstable):
        sums = segsum(x)
        for i in range(5):
            for j in range(5):
                expected = x[:, j + 1 : i + 1].sum(-1) if j <= i else torch.full((2,), -math.inf)
                assert torch.allclose(sums[:, i, j], expected.double())
