"""A watch notices what could make pointers or a captured graph stale, natively and in Python."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from anymamba.ops import backend
from anymamba.ops.backends import INSTALLED
from anymamba.ops.watch import ModuleWatch


def add_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda *_: None)


def replace_module(model: nn.Sequential) -> None:
    model[0] = nn.Linear(3, 3)


def replace_weight(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.ones(3, 3))


def move_weight(model: nn.Sequential) -> None:
    model[0].weight.data = torch.ones(3, 3)


def transpose_weight(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.t()


def change_type(model: nn.Sequential) -> None:
    model.double()


def change_class(model: nn.Sequential) -> None:
    model[0].__class__ = type("Other", (nn.Linear,), {})


def replace_forward(model: nn.Sequential) -> None:
    model[0].forward = lambda x: x


def change_setting(model: nn.Sequential) -> None:
    model[1].eps = 0.5


def add_parameter(model: nn.Sequential) -> None:
    model[1].register_parameter("bias", nn.Parameter(torch.ones(3)))


def add_module(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3))


CHANGES: list[Callable[[nn.Sequential], None]] = [
    *(
        add_hook,
        replace_module,
        replace_weight,
        move_weight,
        transpose_weight,
        change_type,
        change_class,
    ),
    *(replace_forward, change_setting, add_parameter, add_module),
]


@pytest.fixture(params=["native", "python"])
def watched(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Sequential, ModuleWatch]:
    """A model, and a watch of the core's or of a machine without it."""
    if request.param == "python":
        monkeypatch.setitem(INSTALLED, "anymamba._core", False)
    model = nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3, eps=1e-5))
    return model, ModuleWatch(model, list(model), ("eps",))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(
    change: Callable[[nn.Sequential], None], watched: tuple[nn.Sequential, ModuleWatch]
) -> None:
    model, watch = watched
    assert watch.holds()
    change(model)
    assert not watch.holds()


def test_numbers_may_change(watched: tuple[nn.Sequential, ModuleWatch]) -> None:
    model, watch = watched
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    assert watch.holds()


def test_backends_and_autocast_count(watched: tuple[nn.Sequential, ModuleWatch]) -> None:
    _, watch = watched
    with backend("reference"):
        assert not watch.holds()
    with torch.autocast("cpu", torch.bfloat16):
        assert not watch.holds()
    assert watch.holds()


def test_a_replaced_function_is_noticed(
    watched: tuple[nn.Sequential, ModuleWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, watch = watched
    monkeypatch.setattr(nn.functional, "linear", lambda *_: None)
    assert not watch.holds()
