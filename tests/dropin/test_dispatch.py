"""Calls go where their tensors are: with stand-ins for tensors on CUDA, which tests cannot have."""

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from anymamba.dropin import dispatch, install, uninstall
from anymamba.dropin.dispatch import by_device

# Other tests may have imported such models; one test looks for this warning, in a fresh process.
pytestmark = pytest.mark.filterwarnings("ignore:Transformers imported its:RuntimeWarning")


class OnCuda:
    """What the dispatch knows of a tensor on CUDA."""

    is_cuda = True


def answer(x: Any, *more: Any, scale: int = 1, **options: Any) -> str:
    """Our answer."""
    return "ours"


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`answer` as a function of `mamba_ssm.answers`, whose original says "theirs"."""
    original = ModuleType("mamba_ssm.answers")
    original.answer = lambda *args, **kwargs: "theirs"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.answers", original)
    monkeypatch.setattr(answer, "__module__", "anymamba.dropin.mamba_ssm.answers")
    yield by_device(answer)
    uninstall()


def test_cuda_tensors_go_to_the_original(dispatched: Any) -> None:
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    assert dispatched(OnCuda()) == "ours"
    install()
    assert dispatch.answering == {"mamba_ssm"}
    assert [dispatched(x) for x in (cpu, meta, None)] == ["ours"] * 3
    assert dispatched(OnCuda()) == "theirs"
    assert dispatched(cpu, OnCuda(), scale=2) == "theirs"
    assert dispatched(cpu, other=OnCuda()) == "theirs"
    assert dispatched(None, [cpu, (OnCuda(),)]) == "theirs"
    assert dispatched(cpu, [meta]) == "ours"
    install(force=True)
    assert dispatched(OnCuda()) == "ours"
    install()
    assert dispatched(OnCuda()) == "theirs"
    uninstall()
    assert dispatched(OnCuda()) == "ours"


def test_a_package_without_an_original_is_ours(
    dispatched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "__module__", "anymamba.dropin.causal_conv1d.answers")
    of_the_other = by_device(answer)
    install()
    assert dispatched(OnCuda()) == "theirs"
    assert of_the_other(OnCuda()) == "ours"


def test_the_function_looks_the_same(dispatched: Any) -> None:
    assert inspect.signature(dispatched) == inspect.signature(answer)
    assert (dispatched.__name__, dispatched.__doc__) == ("answer", "Our answer.")
