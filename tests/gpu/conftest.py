"""Where these tests run: on a GPU, or with `ANYMAMBA_GPU_TESTS_ON=cpu` on the CPU in its place."""

import os
from pathlib import Path

import pytest
import torch

from anymamba.modeling.generation import graph
from tests.support.graphs import recorded

HERE = Path(__file__).parent
REASON = (
    "needs a GPU that PyTorch can use; run TRITON_INTERPRET=0 pytest tests/gpu where there is one"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or what stands in for one."""
    if os.environ.get("ANYMAMBA_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(REASON)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def captures(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured, on the CPU by a recorder."""
    if device.type == "cpu":
        monkeypatch.setitem(graph.CAPTURES, "cpu", recorded)
