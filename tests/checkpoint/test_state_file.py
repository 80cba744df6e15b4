"""Broken state files are refused in one line, by the cache of PyTorch and by the runtime alike."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anymamba
from anymamba import MambaCache, MambaConfig
from anymamba.errors import StateError
from tests.support.files import refusal, rewritten, write_small

WINDOWS, STATES = (2, 1, 48, 4), (2, 1, 48, 5)
BROKEN: dict[str, dict[str, Any]] = {
    "no format": {"format": None},
    "another format": {"format": "something.else"},
    "a newer version": {"format_version": "2"},
    "no version": {"format_version": None},
    "no model": {"model": None},
    "model is no JSON": {"model": "{"},
    "model is no mapping": {"model": "[1]"},
    "model is nested without end": {"model": "[" * 100_000},
    "no counts": {"token_counts": None},
    "counts are no JSON": {"token_counts": "1,"},
    "counts are no list": {"token_counts": "3"},
    "counts are a mapping": {"token_counts": "{}"},
    "too few counts": {"token_counts": "[]"},
    "too many counts": {"token_counts": "[1, 2]"},
    "negative counts": {"token_counts": "[-1]"},
    "fractional counts": {"token_counts": "[0.5]"},
    "boolean counts": {"token_counts": "[true]"},
    "huge counts": {"token_counts": f"[{2**63}]"},
    "endless digits": {"token_counts": "[" + "9" * 10_000 + "]"},
    "one block": {"ssm_states": None},
    "one block more": {"more": np.zeros(1)},
    "a misshapen window": {"conv_states": np.zeros((2, 1, 48, 3), np.float32)},
    "a misshapen state": {"ssm_states": np.zeros((2, 1, 5, 48), np.float32)},
    "a narrow state": {"ssm_states": np.zeros(STATES, np.float16)},
    "an integer window": {"conv_states": np.zeros(WINDOWS, np.int32)},
    "flat logits": {"logits": np.zeros(61, np.float32)},
    "more logits": {"logits": np.zeros((2, 61), np.float32)},
}
# A cache has rows, takes windows of any floating type, and leaves logits and digests alone.
BROKEN_FOR_THE_RUNTIME: dict[str, dict[str, Any]] = {
    "another digest": {"weights_digest": "0" * 64},
    "an endless digest": {"weights_digest": "0" * 10_000},
    "a wide window": {"conv_states": np.zeros(WINDOWS, np.float64)},
    "integer logits": {"logits": np.zeros((1, 61), np.int32)},
    "two texts": {
        "conv_states": np.zeros((2, 2, 48, 4), np.float32),
        "ssm_states": np.zeros((2, 2, 48, 5), np.float32),
        "logits": None,
        "token_counts": "[1, 2]",
    },
}
Load = Callable[[Path], Any]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> anymamba.Engine:
    return anymamba.load(write_small(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=["cache", "runtime"])
def load(request: pytest.FixtureRequest, engine: anymamba.Engine) -> Load:
    if request.param == "runtime":
        return engine.load_state
    config = MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=5)
    return lambda path: MambaCache.load(path, config=config)


@pytest.fixture(scope="module")
def whole(engine: anymamba.Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good file."""
    path = tmp_path_factory.mktemp("whole") / "a.state"
    engine.prefill(engine.state(), [1, 2, 3]).save(path)
    return path.read_bytes()


def assert_refused(load: Load, path: Path, parts: dict[str, Any]) -> None:
    load(path)
    rewritten(path, **parts)
    message = refusal(StateError, load, path)
    assert str(path) in message
    assert len(message) < 400


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_was_tampered_with(load: Load, whole: bytes, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.state").write_bytes(whole)
    assert_refused(load, tmp_path / "a.state", BROKEN[name])


@pytest.mark.parametrize("name", BROKEN_FOR_THE_RUNTIME)
def test_a_state_that_only_the_runtime_refuses(
    engine: anymamba.Engine, whole: bytes, tmp_path: Path, name: str
) -> None:
    (tmp_path / "a.state").write_bytes(whole)
    assert_refused(engine.load_state, tmp_path / "a.state", BROKEN_FOR_THE_RUNTIME[name])


@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 255))
def test_a_cut_or_scratched_file_never_does_harm(
    load: Load, whole: bytes, tmp_path_factory: pytest.TempPathFactory, share: float, flip: int
) -> None:
    path, at = tmp_path_factory.mktemp("broken") / "a.state", int(len(whole) * share)
    path.write_bytes(whole[:at])
    refusal(StateError, load, path)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    with contextlib.suppress(StateError):  # or a number has become another
        assert tuple(load(path).conv_states.shape) == WINDOWS


@settings(max_examples=40)
@given(noise=st.binary(max_size=200))
def test_noise(load: Load, tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "a.state"
    path.write_bytes(noise)
    refusal(StateError, load, path)


def test_no_file_and_a_folder(load: Load, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(StateError, match="does not exist"):
            load(path)
