"""Settings that all tests share."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports them: no test may reach for a network, and two workers share the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where there is no GPU, NVIDIA's or AMD's, Triton's interpreter runs the kernels on CPU tensors.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell has what it starts in the background ignore Ctrl-C, which some tests press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, settings

from tests.support.hub import Hub, serve
from tests.support.warm import Warm

settings.register_profile(
    "anymamba", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("anymamba")


@pytest.fixture(autouse=True)
def usual_verbosity() -> Iterator[None]:
    """What one test silences in Transformers speaks again in the next."""
    yield
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_warning()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had said offline; the library reads that once, when it is imported."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in for the hub, with an empty cache."""
    with serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield served


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Commands in whose processes PyTorch and Transformers are imported already."""
    started = Warm(tmp_path_factory.mktemp("warm"))
    yield started
    started.close()
