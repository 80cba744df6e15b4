"""What one process gives that nothing interrupts."""

from typing import Any

import pytest
import torch

from tests.training.distributed import work


@pytest.fixture(scope="session")
def alone() -> Any:
    """Its losses and its weights."""
    torch.set_num_threads(1)
    return work.alone()
