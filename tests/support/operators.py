"""Random inputs for the operators, the ways a tensor may lie in memory, and the native core."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from anymamba import ops
from tests.support.instruction_sets import kernels_of
from tests.support.tolerance import assert_contract, assert_gradients

HALVES = (torch.bfloat16, torch.float16)
TYPES = (torch.float32, *HALVES)
# More than one, so that work is shared out; odd, so that it does not share out evenly.
THREADS = "3"


def _inside(tensor: Tensor, *margins: tuple[int, int]) -> Tensor:
    """The same numbers in the middle of a bigger tensor, NaN around them."""
    shape = [
        before + size + after for size, (before, after) in zip(tensor.shape, margins, strict=True)
    ]
    bigger = torch.full(shape, float("nan"), dtype=tensor.dtype)
    spans = zip(tensor.shape, margins, strict=True)
    view = bigger[tuple(slice(before, before + size) for size, (before, _) in spans)]
    return view.copy_(tensor)


def _turned(tensor: Tensor) -> Tensor:
    """The last two axes stored the other way round: (b, l, e) with time contiguous."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _every_second(tensor: Tensor) -> Tensor:
    doubled = tensor.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return doubled[..., ::2, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "time contiguous": _turned,
    "half of a projection": lambda tensor: torch.cat([tensor, tensor], -1).chunk(2, -1)[1],
    "time contiguous, cut out": lambda tensor: _inside(tensor.mT, *[(1, 2)] * tensor.ndim).mT,
    "odd offset": lambda tensor: torch.cat(
        [tensor.new_zeros(3), tensor.flatten(), tensor.new_zeros(1)]
    )[3:-1].view(tensor.shape),
    "cut out": lambda tensor: _inside(tensor, *[(1, 2)] * tensor.ndim),
    "every second number": _every_second,
}
"""Ways to store the same numbers; the last two axes are (steps, channels)."""


def leaves(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same arguments, each floating tensor a leaf of its own that requires a gradient."""
    return {
        name: value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def gradients(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """The gradient of each input by its name, for the given gradients of the outputs."""
    names = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        [inputs[name] for name in names],
        [cotangent.to(output.dtype) for output, cotangent in pairs],
        materialize_grads=True,
    )
    return dict(zip(names, found, strict=True))


def scan_inputs(
    b: int,
    l: int,
    e: int,
    n: int,
    *,
    groups: int | None = None,
    extras: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """All arguments of `selective_scan` as a dict; with `extras` D, z, bias and softplus too."""
    g = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=g)
    shape_of_B = (b, l, n) if groups is None else (b, l, groups, n)
    inputs: dict[str, Any] = {
        "x_ble": normal(b, l, e).to(dtype),
        "delta_ble": (normal(b, l, e) - (1 if extras else -3)).to(dtype),
        "A_en": -torch.rand(e, n, generator=g) * n,
        "B_bln": normal(*shape_of_B).to(dtype),
        "C_bln": normal(*shape_of_B).to(dtype),
    }
    if dtype == torch.float64:
        inputs["A_en"] = inputs["A_en"].double()
    if extras:
        wide = torch.promote_types(dtype, torch.float32)
        inputs |= {
            "D_e": normal(e).to(wide),
            "z_ble": normal(b, l, e).to(dtype),
            "delta_bias_e": normal(e).to(wide),
            "delta_softplus": True,
        }
    else:
        inputs["delta_ble"] = inputs["delta_ble"].abs() * 0.1
    return inputs


IN_TIME = ("x_ble", "delta_ble", "z_ble", "B_bln", "C_bln")


def first_step(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `selective_state_update` for the first position of a sequence."""
    return {
        name.replace("_bl", "_b"): value[:, 0] if name in IN_TIME else value
        for name, value in inputs.items()
    }


def ssd_inputs(
    b: int, l: int, h: int, p: int, g: int, n: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """All arguments of `ssd`; steps of 0 to 1 and rates up to 4 reach from no decay to a lot."""
    random = torch.Generator().manual_seed(b + l + h + p + g + n)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=random).to(kind)

    return {
        "x_blhp": normal(b, l, h, p),
        "dt_blh": normal(b, l, h),
        "A_h": -4 * torch.rand(h, generator=random).to(wide),
        "B_blgn": normal(b, l, g, n),
        "C_blgn": normal(b, l, g, n),
        "D_h": normal(h, p, kind=wide),
        "z_blhp": normal(b, l, h, p),
        "dt_bias_h": normal(h, kind=wide) - 1,
        "dt_softplus": True,
        "initial_state": normal(b, h, p, n, kind=wide),
    }


IN_TIME_OF_HEADS = ("x_blhp", "dt_blh", "z_blhp", "B_blgn", "C_blgn")


def first_step_of_heads(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `ssd_state_update` but the state, for the first position of a sequence."""
    return {
        name.replace("_bl", "_b"): value[:, 0] if name in IN_TIME_OF_HEADS else value
        for name, value in inputs.items()
        if name != "initial_state"
    }


def conv_inputs(
    b: int,
    l: int,
    e: int,
    k: int,
    *,
    windows: int | None = None,
    columns: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """All tensors of `causal_conv1d`; a window for each row, or for each of `windows`."""
    g = torch.Generator().manual_seed(seed)
    n_windows, columns = b if windows is None else windows, k if columns is None else columns
    return {
        "x_ble": torch.randn(b, l, e, generator=g).to(dtype),
        "weight_ek": torch.randn(e, k, generator=g),
        "bias_e": torch.randn(e, generator=g),
        "initial_window": torch.randn(n_windows, e, columns, generator=g).to(dtype),
    }


def norm_inputs(*shape: int, types: tuple[torch.dtype, ...] = (torch.float32,) * 3) -> Any:
    g = torch.Generator().manual_seed(len(shape))
    return {
        "x": torch.randn(shape, generator=g).to(types[0]),
        "weight_d": torch.randn(shape[-1], generator=g).to(types[1]),
        "residual": torch.randn(shape, generator=g).to(types[2]),
    }


def product_inputs(
    m: int, n: int, k: int, types: tuple[torch.dtype, ...] = (torch.float32,) * 3
) -> dict[str, Tensor]:
    """x, weight and bias; scaled so that results are about 1, as a model's are."""
    g = torch.Generator().manual_seed(m * 10007 + n * 101 + k)
    return {
        "x": torch.randn(m, k, generator=g).to(types[0]),
        "weight_nk": (torch.randn(n, k, generator=g) / math.sqrt(max(k, 1))).to(types[1]),
        "bias_n": torch.randn(n, generator=g).to(types[2]),
    }


@dataclass(frozen=True)
class Operator:
    """An operator whose results and gradients are held against float64.

    Attributes:
        call: the operator, with its inputs as a dict and options; returns all outputs.
        dtypes: which types the outputs of such a call must have.
        reference: the same in float64.
        moved: which outputs hold inputs as they were, and are computed by no arithmetic.
    """

    call: Callable[..., tuple[Tensor, ...]]
    dtypes: Callable[..., tuple[torch.dtype, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    moved: tuple[int, ...] = ()

    def exactly(self, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
        """The reference in float64, on the numbers that the inputs hold."""
        return self.reference(doubles(inputs), **options)

    def check(self, inputs: dict[str, Any], **options: Any) -> None:
        """The results and the gradients of all inputs."""
        self.assert_results(inputs, **options)
        self.assert_gradients(inputs, **options)

    def assert_results(self, inputs: dict[str, Any], **options: Any) -> None:
        found, expected = self.call(inputs, **options), self.exactly(inputs, **options)
        assert tuple(output.dtype for output in found) == self.dtypes(inputs, **options)
        for index, (output, reference) in enumerate(zip(found, expected, strict=True)):
            assert_contract(output, reference)
            assert index not in self.moved or torch.equal(output.double(), reference)

    def assert_gradients(
        self,
        inputs: dict[str, Any],
        outputs: Sequence[int] | None = None,
        of: Collection[str] | None = None,
        lay_out: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given,
        cotangent: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        """The gradients against those of the reference in float64.

        Args:
            inputs: the operator's inputs.
            outputs: which outputs count; all if None.
            of: which inputs require a gradient; all if None.
            lay_out: stores the inputs in another way.
            cotangent: makes the gradient of an output like it; random if None.
        """
        ours, theirs = (
            {name: _detached(value, of is None or name in of) for name, value in given.items()}
            for given in (inputs, doubles(inputs))
        )
        found, expected = self.call(lay_out(ours), **options), self.reference(theirs, **options)
        chosen = range(len(found)) if outputs is None else outputs
        g = torch.Generator().manual_seed(7)
        # Rounded before, so that both go back from the same numbers.
        cotangents = [
            cotangent(found[index])
            if cotangent
            else torch.randn(found[index].shape, generator=g).to(found[index].dtype)
            for index in chosen
        ]
        actual = gradients([found[index] for index in chosen], cotangents, ours)
        assert {name: gradient.dtype for name, gradient in actual.items()} == {
            name: inputs[name].dtype for name in actual
        }
        assert_gradients(
            actual, gradients([expected[index] for index in chosen], cotangents, theirs)
        )


def doubles(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _detached(value: Any, requires_grad: bool) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().clone().requires_grad_(requires_grad)


def _scan(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    return ops.selective_scan(**inputs, **options, return_last_state=True)


def _ssd(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    return ops.ssd(**inputs, **options, return_last_state=True)


def _convolve(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    options = {"activation": "silu", "return_final_window": True} | options
    return ops.causal_conv1d(**inputs, **options)


def _norm(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    return ops.rms_norm(**inputs, **options, return_sum=True)


def _types_of_norm(inputs: dict[str, Any], **options: Any) -> tuple[torch.dtype, ...]:
    x, residual = inputs["x"], inputs["residual"]
    wider = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return inputs["weight_d"].dtype, torch.float32 if options.get("residual_in_fp32") else wider


def _product(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    return (inputs["x"] @ inputs["weight_nk"].T + inputs["bias_n"],)


SCAN = Operator(
    _scan,
    lambda inputs, **_: (inputs["x_ble"].dtype, torch.float32),
    partial(_scan, backend="reference"),
)
SSD = Operator(
    _ssd,
    lambda inputs, **_: (inputs["x_blhp"].dtype, torch.float32),
    partial(_ssd, backend="reference"),
)
CONVOLUTION = Operator(
    _convolve,
    lambda inputs, **_: (inputs["x_ble"].dtype,) * 2,
    partial(_convolve, backend="reference"),
    moved=(1,),
)
NORM = Operator(_norm, _types_of_norm, partial(_norm, backend="reference"))
LINEAR = Operator(
    lambda inputs: (ops.linear(**inputs),), lambda inputs: (inputs["x"].dtype,), _product
)


@contextmanager
def natively(isa: str) -> Iterator[None]:
    """Everything inside runs on the native core, with the kernels of one instruction set."""
    with pytest.MonkeyPatch.context() as patch, ops.backend("cpu"), kernels_of(isa):
        patch.setenv("ANYMAMBA_NUM_THREADS", THREADS)
        yield
