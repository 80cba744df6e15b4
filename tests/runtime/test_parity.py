"""The runtime, `MambaForCausalLM` and Transformers' own Mamba: one model, one state."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import anymamba
from anymamba import Engine, MambaCache, MambaForCausalLM
from anymamba.assets import bundled_model
from anymamba.checkpoint.dtypes import to_bfloat16
from anymamba.errors import InputError, StateError
from tests.support.files import write_small
from tests.support.reference import words
from tests.support.tolerance import assert_same

# The contract for whole models: float32, and bfloat16 storage.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
FIELDS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "use_bias": True},
    {"use_conv_bias": False, "conv_kernel": 3, "expand": 1},
    {"hidden_size": 33, "state_size": 16, "time_step_rank": 5},
]
IDS = words(70)


def stored(folder: Path, dtype: str, **fields: Any) -> Path:
    """A checkpoint in that type, written by Transformers."""
    write_small(folder, **fields)
    model = transformers.MambaForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def torch_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_logits(tmp_path: Path, dtype: str, fields: dict[str, Any]) -> None:
    folder = stored(tmp_path, dtype, **fields)
    engine = anymamba.load(folder)
    assert engine.weight_type == {"float32": "f32", "bfloat16": "bf16"}[dtype]
    logits = engine.logits(IDS)
    ours = MambaForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_same(logits, torch_logits(ours, IDS), TOLERANCES[dtype])
    # Transformers in bfloat16 rounds as much as we do, at other places: its float32 is the truth.
    exact = transformers.MambaForCausalLM.from_pretrained(folder, dtype="float32")
    assert_same(logits, torch_logits(exact, IDS), TOLERANCES[dtype])


def test_the_bundled_model() -> None:
    engine, exact = anymamba.load(), anymamba.load(weights="f32")
    ids = engine.tokenize("ROMEO:\nBut, soft! what light through yonder window breaks?\n")
    for dtype, ours in (("float32", exact), ("bfloat16", engine)):
        model = MambaForCausalLM.from_pretrained(bundled_model(), dtype=dtype)
        assert_same(ours.logits(ids), torch_logits(model, ids), TOLERANCES[dtype])


def test_greedy_texts(tmp_path: Path) -> None:
    folder = stored(tmp_path, "float32")
    engine, model = anymamba.load(folder), MambaForCausalLM.from_pretrained(folder)
    output = model.generate(torch.tensor([IDS]), max_new_tokens=40, do_sample=False)
    assert engine.generate(IDS, 40).ids == output[0, len(IDS) :].tolist()


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (to_bfloat16(values) == expected).all()


# States.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("model"), "bfloat16")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return anymamba.load(folder, weights="f32")


@pytest.fixture(scope="module")
def model(folder: Path) -> MambaForCausalLM:
    """A bfloat16 checkpoint as float32, as on most CPUs."""
    return MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def read(model: MambaForCausalLM, ids: list[int], batch: int = 1) -> MambaCache:
    cache = MambaCache(model.config, batch, dtype=model.dtype)
    with torch.no_grad():
        model(torch.tensor([ids] * batch), cache=cache)
    return cache


def next_logits(model: MambaForCausalLM, cache: MambaCache, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), cache=cache).logits[0].numpy()


def test_a_state_becomes_a_cache(engine: Engine, model: MambaForCausalLM) -> None:
    state = engine.prefill(engine.state(), IDS)
    cache = MambaCache.from_state(state, model.config)
    assert cache.token_counts.tolist() == [70]
    logits = next_logits(model, cache, [3, 4])
    assert_same(logits, engine.logits([3, 4], state.copy()))
    assert state.token_count == 70  # a copy went on, not the state


def test_a_cache_becomes_a_state(engine: Engine, model: MambaForCausalLM) -> None:
    cache = read(model, IDS, batch=2)
    with torch.no_grad():
        model(torch.tensor([[1], [2]]), cache=cache)
    state = cache.to_state(engine, row=1)
    assert (state.token_count, state.logits) == (71, None)
    assert_same(engine.logits([3, 4], state), engine.logits([*IDS, 2, 3, 4])[-2:])
    assert cache.token_counts.tolist() == [71, 71]


def test_there_and_back_nothing_changes(engine: Engine, model: MambaForCausalLM) -> None:
    state = engine.prefill(engine.state(), IDS)
    back = MambaCache.from_state(state, model.config).to_state(engine)
    assert (back.conv_states == state.conv_states).all()
    assert (back.ssm_states == state.ssm_states).all()
    assert back.token_count == 70


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_file_serves_both(
    engine: Engine, model: MambaForCausalLM, tmp_path: Path, dtype: str
) -> None:
    state = engine.prefill(engine.state(), IDS)
    state.save(tmp_path / "a.state", dtype=dtype)
    cache = MambaCache.load(tmp_path / "a.state", model=model)
    tolerance = TOLERANCES[dtype]
    expected = engine.logits([*IDS, 3, 4])[-2:]
    assert_same(next_logits(model, cache, [3, 4]), expected, tolerance)
    read(model, IDS).save(tmp_path / "b.state", model=model)
    loaded = engine.load_state(tmp_path / "b.state")
    assert_same(engine.logits([3, 4], loaded), expected)


def test_the_digest_is_the_same_in_every_type(folder: Path, tmp_path: Path) -> None:
    """A bfloat16 checkpoint, in bfloat16 and as float32, in PyTorch and in the runtime."""
    for dtype in (torch.float32, torch.bfloat16):
        model = MambaForCausalLM.from_pretrained(folder, dtype=dtype)
        read(model, IDS).save(tmp_path / "a.state", model=model)
        for kind in ("auto", "f32", "int8"):
            assert anymamba.load(folder, kind).load_state(tmp_path / "a.state").token_count == 70


def test_files_of_other_models_and_of_batches_are_refused(
    engine: Engine, model: MambaForCausalLM, tmp_path: Path
) -> None:
    other = MambaForCausalLM.from_pretrained(write_small(tmp_path / "other", seed=1))
    read(other, IDS).save(tmp_path / "a.state", model=other)
    with pytest.raises(StateError, match="digest"):
        engine.load_state(tmp_path / "a.state")
    engine.prefill(engine.state(), IDS).save(tmp_path / "b.state")
    with pytest.raises(StateError, match="digest"):
        MambaCache.load(tmp_path / "b.state", model=other)
    read(model, IDS, batch=3).save(tmp_path / "c.state", model=model)
    with pytest.raises(StateError, match="holds 3 texts, expected one"):
        engine.load_state(tmp_path / "c.state")


def test_conversions_that_do_not_fit_are_refused(engine: Engine, model: MambaForCausalLM) -> None:
    cache = read(model, IDS)
    for row in (-1, 1, True, "0"):
        with pytest.raises(InputError, match="row must be an integer from 0 to 0"):
            cache.to_state(engine, row)
    bundled = anymamba.load()
    with pytest.raises(StateError, match="num_hidden_layers=2, this model has num_hidden_layers=7"):
        cache.to_state(bundled)
    with pytest.raises(StateError, match="num_hidden_layers=7, this model has num_hidden_layers=2"):
        MambaCache.from_state(bundled.state(), model.config)
