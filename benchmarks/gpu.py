"""How fast are the Triton kernels and `generate` on a GPU, beside the limit of its memory?"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from anymamba import ops
from anymamba.errors import AnyMambaError
from anymamba.ops.triton import is_available, is_interpreted
from anymamba.upstream import import_original
from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.shapes import MAMBA_130M, QUICK
from common.tables import (
    MILLISECONDS,
    NAME,
    NOTE,
    SHARE,
    SPEED,
    SPREAD,
    Column,
    Row,
    Table,
    not_measured,
    timed,
)
from common.timing import Case, Timing, interleave
from contenders.anymamba_model import random_model

OURS, CUDA, PYTORCH = "AnyMamba, Triton", "mamba_ssm, CUDA", "AnyMamba, PyTorch code"
UPSTREAM_REFERENCE = "mamba_ssm, selective_scan_ref"
LIMIT = "limit: every number once"
OF_CUDA = Column("of_cuda", "CUDA's time over it", "{:.2f}")
PEAK = Column("peak_megabytes", "peak, MB", "{:.0f}")
COLUMNS = (NAME, MILLISECONDS, SPREAD, SHARE, OF_CUDA, PEAK, NOTE)
STATES = 16
# Beyond, code that keeps every state would take more memory than a GPU has.
MOST_STATES_KEPT = 1 << 31
STORAGE = torch.bfloat16
LAUNCHES = 10


@dataclass(frozen=True)
class Size:
    """A batch of b rows, l steps and e channels."""

    b: int
    l: int
    e: int

    def __str__(self) -> str:
        return f"batch {self.b}, length {self.l:,}, width {self.e:,}"


QUICK_SIZES = (Size(1, 3, 4),)
SIZES = (
    *(Size(b, l, 1536) for l in (512, 2048, 8192, 16384) for b in (1, 8)),
    *(Size(b, 2048, e) for e in (2560, 5120) for b in (1, 8)),
    Size(1, 16384, 5120),
)


def main() -> int:
    """Measure operators, then a model; print and write. 2 where there is no GPU."""
    options = options_from(parser("gpu", __doc__ or "").parse_args())
    device = the_device(options)
    if device is None:
        print(
            "gpu.py: needs a GPU that PyTorch can use; --quick with TRITON_INTERPRET=1 tries the "
            "script on a CPU",
            file=sys.stderr,
        )
        return 2
    machine = describe(options.quick) | {"gpu": description(device)}
    tables = []
    for size in QUICK_SIZES if options.quick else SIZES:
        for backward in (False, True):
            tables.append(scan_table(size, backward, device, options))
    tables.append(operators_table(device, options))
    tables.append(generate_table(device, options))
    finish("gpu", options, machine, tables)
    return 0


def the_device(options: Options) -> torch.device | None:
    """A GPU, or for a smoke run the CPU where Triton's kernels are interpreted."""
    for kind in ("cuda", "xpu"):
        if is_available(kind):
            return torch.device(kind, 0)
    return torch.device("cpu") if options.quick and is_interpreted() else None


def description(device: torch.device) -> dict[str, Any]:
    """The GPU, its memory, and what is installed for it."""
    if device.type == "cpu":
        return {"name": "none: Triton's interpreter on the CPU"}
    properties = torch.get_device_module(device).get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "processors": getattr(properties, "multi_processor_count", None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": __import__("triton").__version__,
    }


class ScanInputs:
    """One call's tensors as a model hands them over: channels last, x and z halves of one product.

    Args:
        size: of the batch.
        device: where.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        b, l, e = size.b, size.l, size.e
        random = partial(torch.randn, device=device)
        self.x_ble, self.z_ble = random(b, l, 2 * e).to(STORAGE).chunk(2, -1)
        self.delta_ble = random(b, l, e).to(STORAGE)
        self.B_bln, self.C_bln = random(b, l, 2 * STATES).to(STORAGE).chunk(2, -1)
        self.A_en = -torch.arange(1.0, STATES + 1, device=device).repeat(e, 1)
        self.D_e, self.delta_bias_e = torch.ones(e, device=device), random(e) - 4
        self.dy_ble = random(b, l, e).to(STORAGE)

    def ours(self) -> list[Tensor]:
        """The tensors in the order of `anymamba.ops.selective_scan`."""
        first = [self.x_ble, self.delta_ble, self.A_en, self.B_bln, self.C_bln]
        return [*first, self.D_e, self.z_ble, self.delta_bias_e]

    def theirs(self) -> list[Tensor]:
        """In the layout that mamba_ssm's kernel is made for: time last, without gaps."""
        return [t.mT.contiguous() if t.ndim == 3 else t for t in self.ours()]


def scan_table(size: Size, backward: bool, device: torch.device, options: Options) -> Table:
    """The scan of one size, with the gate, D and softplus."""
    inputs = ScanInputs(size, device)
    words = "forward and backward" if backward else "forward"
    table = Table(f"Scan, {words}, {size}, state {STATES}, bfloat16", COLUMNS)
    runs: dict[str, Callable[[], object]] = {
        LIMIT: copy_of(bytes_of_scan(size, backward), device),
        OURS: our_scan(inputs, backward, "triton"),
    }
    missing: list[Row] = []
    theirs = their_scan(inputs, backward)
    if callable(theirs):
        runs[CUDA] = theirs
    else:
        missing.append(not_measured(CUDA, theirs))
    if size.b * size.l * size.e * STATES <= MOST_STATES_KEPT:
        runs[PYTORCH] = our_scan(inputs, backward, "reference")
        reference = upstream_reference(inputs, backward)
        if callable(reference):
            runs[UPSTREAM_REFERENCE] = reference
        else:
            missing.append(not_measured(UPSTREAM_REFERENCE, reference))
    table.rows = measured_rows(runs, device, options) + missing
    return table


def our_scan(inputs: ScanInputs, backward: bool, backend: str) -> Callable[[], object]:
    """Our operator, on a backend."""
    scan = partial(ops.selective_scan, delta_softplus=True, backend=backend)
    return (
        with_backward(scan, inputs.ours(), inputs.dy_ble)
        if backward
        else alone(scan, inputs.ours())
    )


def their_scan(inputs: ScanInputs, backward: bool) -> Callable[[], object] | str:
    """mamba_ssm's CUDA kernel, or why it cannot be measured."""
    try:
        import_original("selective_scan_cuda")
        scan_fn = import_original("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except (ImportError, AnyMambaError) as error:
        return f"not measured: {error}"
    scan = partial(scan_fn, delta_softplus=True)
    tensors = inputs.theirs()
    dy_bel = inputs.dy_ble.mT.contiguous()
    return with_backward(scan, tensors, dy_bel) if backward else alone(scan, tensors)


def upstream_reference(inputs: ScanInputs, backward: bool) -> Callable[[], object] | str:
    """mamba_ssm's PyTorch code, or why it cannot be measured."""
    try:
        interface = import_original("mamba_ssm.ops.selective_scan_interface")
    except (ImportError, AnyMambaError) as error:
        return f"not measured: {error}"
    scan = partial(interface.selective_scan_ref, delta_softplus=True)
    dy_bel = inputs.dy_ble.mT.contiguous()
    tensors = inputs.theirs()
    return with_backward(scan, tensors, dy_bel) if backward else alone(scan, tensors)


def alone(function: Callable[..., Any], tensors: list[Tensor]) -> Callable[[], object]:
    """A call without gradients."""
    return torch.no_grad()(partial(function, *tensors))


def with_backward(
    function: Callable[..., Any], tensors: list[Tensor], dy: Tensor
) -> Callable[[], object]:
    """A call and the gradients of all its tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def bytes_of_scan(size: Size, backward: bool) -> int:
    """What has to be read and written at least: each number once a pass.

    Forward, x, delta, z, B and C are read and y is written. Backward, they and dy are read, and
    their gradients written (those of B and C in float32).
    """
    wide, narrow = size.b * size.l * size.e * 2, size.b * size.l * STATES * 2
    forward = 4 * wide + 2 * narrow
    return forward + 4 * wide + 2 * narrow + 3 * wide + 4 * narrow if backward else forward


def copy_of(count: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes so many bytes in all."""
    source = torch.empty(count // 2, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def operators_table(device: torch.device, options: Options) -> Table:
    """The convolution, the norm and the single steps, beside PyTorch's way to do each."""
    size = QUICK_SIZES[0] if options.quick else Size(8, 2048, 1536)
    inputs = ScanInputs(size, device)
    e = size.e
    weight_ek, bias_e = torch.randn(e, 4, device=device), torch.randn(e, device=device)
    hidden, gain = inputs.delta_ble, torch.ones(e, device=device)
    state_ben = torch.zeros(size.b, e, STATES, device=device)
    step = [t[:, 0] if t.ndim == 3 else t for t in inputs.ours()]

    def convolution() -> Tensor:
        x_bel = functional.conv1d(
            inputs.x_ble.mT, weight_ek[:, None].to(STORAGE), bias_e.to(STORAGE), padding=3, groups=e
        )
        return functional.silu(x_bel[..., : size.l])

    def norm(backend: str) -> Callable[[], object]:
        return partial(
            ops.rms_norm, hidden, gain, residual=hidden, return_sum=True, backend=backend
        )

    runs: dict[str, Callable[[], object]] = {}
    for name, backend in ((OURS, "triton"), (PYTORCH, "reference")):
        runs[f"convolution, {name}"] = partial(
            ops.causal_conv1d, inputs.x_ble, weight_ek, bias_e, "silu", backend=backend
        )
        runs[f"norm of a sum, {name}"] = norm(backend)
        runs[f"one step of the scan, {name}"] = partial(
            ops.selective_state_update, state_ben, *step, delta_softplus=True, backend=backend
        )
    runs["convolution, PyTorch's conv1d and silu"] = convolution
    table = Table(f"Operators, forward, {size}, bfloat16", COLUMNS)
    quiet = {name: torch.no_grad()(run) for name, run in runs.items()}
    table.rows = measured_rows(quiet, device, options)
    return table


def generate_table(device: torch.device, options: Options) -> Table:
    """Greedy text, batch 1: our model and Transformers' with the same weights."""
    import transformers

    shape, steps = (QUICK, 4) if options.quick else (MAMBA_130M, 128)
    ours = random_model(shape).to(device, STORAGE)
    config = transformers.MambaConfig(**shape.as_config())
    theirs = transformers.MambaForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    theirs.generation_config.eos_token_id = None
    theirs.to(device, STORAGE).train(False)
    ids_bl = torch.randint(shape.vocab_size, (1, 16), device=device)

    def generate(model: Any) -> Callable[[], object]:
        options = {"max_new_tokens": steps, "do_sample": False}
        mask = torch.ones_like(ids_bl)
        return lambda: model.generate(ids_bl, attention_mask=mask, **options)

    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    limit = copy_of(2 * weights, device)  # which is read and written, so twice its time
    runs = {
        "AnyMamba": generate(ours),
        f"Transformers {transformers.__version__}": generate(theirs),
        LIMIT: lambda: [limit() for _ in range(steps)],
    }
    table = Table(
        f"generate, {steps} tokens, batch 1, bfloat16", (NAME, MILLISECONDS, SPREAD, SPEED)
    )
    timings = clocked(runs, device, options, launches=1)
    timings[LIMIT] = timings[LIMIT].times(0.5)
    table.rows = [timed(name, timing, steps) for name, timing in timings.items()]
    return table


def measured_rows(
    runs: dict[str, Callable[[], object]], device: torch.device, options: Options
) -> list[Row]:
    """A row for each run, with its share of the limit and its speed beside CUDA's."""
    timings = clocked(runs, device, options, launches=1 if options.quick else LAUNCHES)
    rows = []
    for name, timing in timings.items():
        row = timed(name, timing, limit=timings.get(LIMIT))
        row["of_cuda"] = timing.speed_beside(timings[CUDA]) if CUDA in timings else None
        row["peak_megabytes"] = peak(runs[name], device)
        rows.append(row)
    return rows


def clocked(
    runs: dict[str, Callable[[], object]], device: torch.device, options: Options, launches: int
) -> dict[str, Timing]:
    """Seconds of a run; several are launched one after the other before the clock stops."""

    def waiting(run: Callable[[], object]) -> Callable[[], object]:
        def launch() -> None:
            for _ in range(launches):
                run()
            wait(device)

        return launch

    cases = [Case(name, waiting(run), prepare=partial(wait, device)) for name, run in runs.items()]
    timings = interleave(cases, options.rounds or 20)
    return {name: timing.times(1 / launches) for name, timing in timings.items()}


def wait(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def peak(run: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that a run takes at most beyond what it was given."""
    if device.type == "cpu":
        return None
    memory = torch.get_device_module(device)
    gc.collect()
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    run()
    wait(device)
    return float(memory.max_memory_allocated(device) - before) / 1e6


if __name__ == "__main__":
    sys.exit(main())
