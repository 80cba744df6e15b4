"""The choice of a backend, and the CUDA adapters against stand-ins of the packages they call."""

import dataclasses
import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from anymamba import ops
from anymamba.errors import BackendError
from anymamba.ops import backends, triton
from anymamba.ops.conv.arguments import ConvArguments
from anymamba.ops.mamba_ssm_limits import unsupported_reason
from anymamba.ops.scan.arguments import ScanArguments
from anymamba.ops.ssd.arguments import SsdArguments
from tests.support.operators import scan_inputs
from tests.support.tolerance import assert_contract

pytestmark = pytest.mark.usefixtures("automatic_choice")


def test_a_choice_lasts_as_long_as_its_context() -> None:
    assert ops.backend() == "auto"
    with ops.backend("reference"):
        assert ops.backend() == "reference"
        with ops.backend("mambapy"):
            assert ops.backend() == "mambapy"
        assert ops.backend() == "reference"
    assert ops.backend() == "auto"


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYMAMBA_BACKEND", "reference")
    assert ops.backend() == "reference"
    monkeypatch.setenv("ANYMAMBA_BACKEND", "abacus")
    with pytest.raises(BackendError, match="ANYMAMBA_BACKEND: unknown backend 'abacus'"):
        ops.backend()


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(BackendError, match=r"choose one of auto, .*reference"):
        ops.backend("abacus")


def test_a_backend_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "INSTALLED", dict.fromkeys(backends.INSTALLED, False))
    with pytest.raises(BackendError, match="pip install mamba-ssm causal-conv1d"):
        ops.backend("mamba_ssm")
    with pytest.raises(BackendError, match="pip install mambapy"):
        ops.selective_scan(**scan_inputs(1, 2, 2, 2), backend="mambapy")


def test_an_older_name_is_taken_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(backends.BACKENDS["mamba_ssm"], packages=(), devices=())
    monkeypatch.setitem(backends.BACKENDS, "mamba_ssm", entry)
    with pytest.warns(DeprecationWarning, match="'cuda' is called 'mamba_ssm' now"):
        choice = ops.backend("cuda")
    assert isinstance(choice, backends.Chosen)
    with choice:
        assert ops.backend() == "mamba_ssm"
    monkeypatch.setenv("ANYMAMBA_BACKEND", "cuda")
    with pytest.warns(DeprecationWarning, match="ANYMAMBA_BACKEND: the backend 'cuda'"):
        assert ops.backend() == "mamba_ssm"


def test_every_backend_is_listed_with_a_reason() -> None:
    rows = ops.available_backends()
    assert [name for name, _, _ in rows] == list(backends.PREFERENCE)
    assert rows[-1][0] == "reference"
    assert rows[-1][1]
    assert all(reason for _, _, reason in rows)


def test_triton_goes_first_only_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: what the choice asks of both."""
    limits = importlib.import_module("anymamba.ops.mamba_ssm_limits")
    arguments = ScanArguments(*list(scan_inputs(1, 2, 2, 2).values())[:5])
    assert "not measured on hardware" in limits.description()
    assert not limits.prefers_other("selective_scan", arguments)
    monkeypatch.setattr(limits, "SLOWER_THAN_TRITON", {"selective_scan": "a result"})
    monkeypatch.setattr(limits, "_HAS_TRITON", True)
    assert "except for selective_scan" in limits.description()
    assert limits.prefers_other("selective_scan", arguments)
    assert not limits.prefers_other("causal_conv1d", arguments)
    # Nor where Triton's kernels could not serve the call.
    doubled = arguments._replace(x_ble=arguments.x_ble.double())
    assert not limits.prefers_other("selective_scan", doubled)


@pytest.mark.parametrize(
    ("found", "reason"),
    [("3.3.1", "triton 3.3.1 is too old, 3.4"), ("3.4.0", None), ("3.10", None)],
)
def test_a_triton_that_is_too_old_is_named(
    found: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("anymamba.ops.triton")
    monkeypatch.setattr(module, "version", lambda _: found)
    said = module.why_too_old()
    assert said is None if reason is None else said.startswith(reason)
    entry = dataclasses.replace(backends.BACKENDS["triton"], packages=(), obstacle=said)
    assert entry.absent() == said


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0)])
def test_triton_leaves_ssd_to_others_on_gpus_before_the_a100(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step multiplies no matrices, and runs on all."""
    monkeypatch.setattr(triton, "_capabilities", {})
    asked = []
    answer = lambda device: asked.append(device) or capability  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", answer)
    monkeypatch.setattr(torch.version, "hip", None)
    with FakeTensorMode():
        shapes = ((1, 2, 2, 3), (1, 2, 2), (2,), (1, 2, 1, 4), (1, 2, 1, 4))
        sequence = SsdArguments(*(torch.zeros(shape, device="cuda") for shape in shapes))
        of_step = ((1, 2, 3), (1, 2), (2,), (1, 1, 4), (1, 1, 4))
        step = [torch.zeros(shape, device="cuda") for shape in of_step]
    reason = triton.unsupported_reason("ssd", sequence)
    assert triton.unsupported_reason("ssd", sequence) == reason
    assert len(asked) == 1
    if capability >= (8, 0):
        assert reason is None
    else:
        found = ".".join(map(str, capability))
        assert reason == f"its ssd takes GPUs of compute capability 8.0 or more, not {found}"
    assert triton.unsupported_reason("ssd_state_update", step) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton.unsupported_reason("ssd", sequence) is None  # AMD's are numbered otherwise


def test_a_compiler_may_ask_what_a_gpu_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(triton, "_capabilities", {device: (7, 5)})
    monkeypatch.setattr(torch.version, "hip", None)

    def call(x: Tensor) -> Tensor:
        return x + 1 if triton._capability(device) < (8, 0) else x

    assert torch.equal(
        torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(2)), torch.ones(2)
    )


def test_triton_is_interpreted_where_the_installed_triton_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before it had knobs it took "1" alone."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    older = PathFinder.find_spec("triton", [str(tmp_path)])
    monkeypatch.setattr(triton, "find_spec", lambda _: older)
    assert triton._words_for_yes() == ("1",)
    (tmp_path / "triton" / "knobs.py").touch()
    assert "true" in triton._words_for_yes()
    for words, word, expected in ((("1",), "true", False), (("1",), "1", True)):
        monkeypatch.setattr(triton, "_YES", words)
        monkeypatch.setenv("TRITON_INTERPRET", word)
        assert triton.is_interpreted() == expected


@pytest.mark.parametrize("word", ["", "0", "1", "True", "ON", "yes", "y", "t", "2"])
def test_words_for_the_interpreter_are_those_of_triton(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = pytest.importorskip("triton.knobs", reason="needs Triton 3.4: pip install triton")
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert triton.is_interpreted() == knobs.runtime.interpret


def test_the_fallback_is_taken_where_no_kernel_is(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = importlib.import_module("anymamba.ops.scan.mambapy").selective_scan

    def spy(*args: Any, **kwargs: Any) -> Any:
        taken.append("mambapy")
        return real(*args, **kwargs)

    monkeypatch.setitem(backends._loaded, "anymamba.ops.scan.mambapy:selective_scan", spy)
    monkeypatch.setattr(backends, "PREFERENCE", ("mambapy", "reference"))
    ops.selective_scan(**scan_inputs(1, 2, 2, 2))
    assert not taken
    ops.selective_scan(**scan_inputs(1, 2, 2, 2), fallback="mambapy")
    assert taken == ["mambapy"]


def _stand_ins() -> dict[str, ModuleType]:
    """The CUDA packages' entry points by their documentation, in PyTorch, channels first."""

    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:
        assert A.dtype == torch.float32
        batch, e, length = u.shape
        if delta_bias is not None:
            delta = delta + delta_bias[:, None]
        delta = F.softplus(delta) if delta_softplus else delta
        h, outputs = torch.zeros(batch, e, A.shape[1]), []
        for t in range(length):
            h = torch.exp(delta[:, :, t, None] * A) * h
            h = h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
            outputs.append((h * C[:, None, :, t]).sum(-1))
        y = torch.stack(outputs, 2)
        y = y if D is None else y + D[:, None] * u
        y = y if z is None else y * F.silu(z)
        return (y, h) if return_last_state else y

    def conv(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        width = weight.shape[1]
        y = F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=x.shape[1])
        return F.silu(y) if activation else y

    names = [
        "mamba_ssm",
        "mamba_ssm.ops",
        "mamba_ssm.ops.selective_scan_interface",
        "mamba_ssm.ops.triton",
        "mamba_ssm.ops.triton.selective_state_update",
        "causal_conv1d",
    ]
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = scan
    triton = modules["mamba_ssm.ops.triton.selective_state_update"]
    modules["mamba_ssm.ops.triton"].selective_state_update = triton
    modules["causal_conv1d"].causal_conv1d_fn = conv
    return modules


def test_the_mamba_ssm_adapters_speak_the_packages_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in _stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("anymamba.ops.scan.mamba_ssm", "anymamba.ops.conv.mamba_ssm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    scan = importlib.import_module("anymamba.ops.scan.mamba_ssm").selective_scan
    conv = importlib.import_module("anymamba.ops.conv.mamba_ssm").causal_conv1d
    inputs = scan_inputs(2, 9, 8, 4)
    expected, expected_last = ops.selective_scan(
        **inputs, return_last_state=True, backend="reference"
    )
    y, last = scan(ScanArguments(**inputs, return_last_state=True))
    assert_contract(y, expected)
    assert_contract(last, expected_last)
    x, weight, bias = torch.randn(2, 9, 8), torch.randn(8, 4), torch.randn(8)
    y, _ = conv(ConvArguments(x, weight, bias, "silu"))
    assert_contract(y, ops.causal_conv1d(x, weight, bias, "silu", backend="reference"))
    for name in ("anymamba.ops.scan.mamba_ssm", "anymamba.ops.conv.mamba_ssm"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"initial_state": torch.zeros(1)}, "no initial state"),
        ({"reverse": True}, "no reverse"),
        ({"segments": object()}, "no packed sequences"),
        ({"A_en": torch.zeros(2, 300)}, "state size of 256"),
    ],
)
def test_what_mamba_ssm_cannot_do_has_a_reason(change: dict[str, Any], reason: str) -> None:
    arguments = ScanArguments(**scan_inputs(1, 3, 2, 4))
    assert unsupported_reason("selective_scan", arguments) is None
    assert reason in str(unsupported_reason("selective_scan", arguments._replace(**change)))
