"""`MambaCache`: the state as a value, held against plain lists and tensors that do the same."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import MambaConfig as TransformersConfig
from transformers.cache_utils import Cache

from anymamba.errors import InputError, StateError
from anymamba.modeling.cache import MambaCache, model_identity
from anymamba.modeling.config import MambaConfig
from anymamba.modeling.mamba.causal_lm import MambaForCausalLM
from anymamba.modeling.mamba.model import MambaModel
from tests.support.files import refusal
from tests.support.tolerance import assert_each

N_LAYER, E, N, K = 3, 16, 5, 4
CONFIG = MambaConfig(
    vocab_size=11, hidden_size=8, num_hidden_layers=N_LAYER, state_size=N, conv_kernel=K
)


def filled(batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> MambaCache:
    """A cache with something in it, different in every place."""
    generator = torch.Generator().manual_seed(seed)
    cache = MambaCache(CONFIG, batch, dtype=dtype)
    cache.conv_states.copy_(torch.randn(cache.conv_states.shape, generator=generator))
    cache.ssm_states.copy_(torch.randn(cache.ssm_states.shape, generator=generator))
    cache.token_counts.copy_(torch.randint(0, 1000, (batch,), generator=generator))
    return cache


def blocks(cache: MambaCache) -> tuple[Tensor, Tensor, Tensor]:
    return cache.conv_states, cache.ssm_states, cache.token_counts


def assert_equal(cache: MambaCache, other: MambaCache) -> None:
    for mine, theirs in zip(blocks(cache), blocks(other), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_new_cache_is_two_contiguous_blocks_of_zeros(batch: int) -> None:
    cache = MambaCache(CONFIG, batch)
    assert cache.conv_states.shape == (N_LAYER, batch, E, K)
    assert cache.ssm_states.shape == (N_LAYER, batch, E, N)
    assert cache.conv_states.dtype == cache.dtype == torch.float16
    assert cache.ssm_states.dtype == torch.float32
    assert cache.token_counts.dtype == torch.int64
    assert cache.token_counts.tolist() == [0] * batch
    for block in blocks(cache):
        assert block.is_contiguous()
        assert not block.any()


def test_it_is_built_from_either_library_s_config() -> None:
    theirs = TransformersConfig(hidden_size=8, num_hidden_layers=2, state_size=6)
    assert MambaCache(theirs, 1).ssm_states.shape == (2, 1, 16, 6)


@pytest.mark.parametrize("batch", [-1, 1.5, "2", None, torch.tensor(2)])
def test_a_batch_size_that_makes_no_sense_is_refused(batch: object) -> None:
    with pytest.raises(InputError, match="max_batch_size must be an integer >= 0"):
        MambaCache(CONFIG, batch)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float16", None])
def test_a_type_that_is_not_floating_is_refused(dtype: object) -> None:
    with pytest.raises(InputError, match="dtype must be a floating"):
        MambaCache(CONFIG, 1, dtype=dtype)


@settings(deadline=None)
@given(widths=st.lists(st.integers(0, 2 * K), max_size=6), data=st.data())
def test_a_window_holds_the_last_inputs_however_they_arrive(
    widths: list[int], data: st.DataObject
) -> None:
    batch = data.draw(st.integers(0, 2))
    inputs = torch.arange(batch * E * sum(widths), dtype=torch.float32).view(batch, E, sum(widths))
    cache = MambaCache(CONFIG, batch, dtype=torch.float32)
    start = 0
    for width in widths:
        piece = inputs[..., start : start + width]
        positions = torch.arange(start, start + width)
        window = cache.update_conv_state(1, piece, cache_position=positions)
        assert window.data_ptr() == cache.conv_states[1].data_ptr()
        start += width
    # Zeros stand before the first input, as the convolution's padding has them.
    history = torch.cat([torch.zeros(batch, E, K), inputs], dim=-1)
    assert torch.equal(cache.conv_states[1], history[..., history.shape[-1] - K :])
    assert not cache.conv_states[0].any()
    assert not cache.conv_states[2].any()


def test_the_two_calls_of_transformers_historical_code() -> None:
    """Its prefill pads or crops to k columns at positions 0..k-1; its decoding appends one."""
    cache = MambaCache(CONFIG, 2, dtype=torch.float32)
    prompt, token = torch.randn(2, E, 3), torch.randn(2, E, 1)
    padded = torch.nn.functional.pad(prompt, (K - 3, 0))
    cache.update_conv_state(0, padded, torch.arange(K))
    window = cache.update_conv_state(0, token, torch.tensor([3]))
    assert torch.equal(window, torch.cat([prompt, token], -1))


def test_updates_round_to_the_cache_s_type_and_keep_no_graph() -> None:
    cache = MambaCache(CONFIG, 1, dtype=torch.bfloat16)
    new = torch.full((1, E, 1), 1 / 3, requires_grad=True)
    window = cache.update_conv_state(0, new, torch.tensor([0]))
    assert window[0, 0, -1] == torch.tensor(1 / 3).bfloat16()
    state = cache.update_ssm_state(0, torch.ones(1, E, N, dtype=torch.float16, requires_grad=True))
    assert state.dtype == torch.float32
    assert state.data_ptr() == cache.ssm_states[0].data_ptr()
    assert not window.requires_grad
    assert not state.requires_grad


def test_the_names_of_transformers_5() -> None:
    cache = MambaCache(CONFIG, 1, dtype=torch.float32)
    assert cache.get_conv_state(0) is None
    assert cache.get_recurrent_state(0) is None
    cache.update_recurrent_state(torch.ones(1, E, N), 2)
    assert torch.equal(cache.ssm_states[2], torch.ones(1, E, N))
    cache.token_counts += 1
    assert cache.get_recurrent_state(2).data_ptr() == cache.ssm_states[2].data_ptr()
    assert cache.get_conv_state(1).data_ptr() == cache.conv_states[1].data_ptr()


def test_arguments_that_do_not_fit_are_named() -> None:
    cache = MambaCache(CONFIG, 2)
    new, here = torch.zeros(2, E, 1), torch.tensor([0])
    for layer in (-1, N_LAYER, 0.0, None):
        with pytest.raises(InputError, match="layer_idx must be an integer from 0 to 2"):
            cache.update_conv_state(layer, new, here)
    # The argument order of Transformers 5.
    with pytest.raises(InputError, match=r"layer_idx must be an integer .* got Tensor"):
        cache.update_conv_state(new, 0, 0)
    for shape in ((1, E, 1), (2, E + 1, 1), (2, E)):
        with pytest.raises(InputError, match=r"new_conv_state must have shape \(2, 16, width\)"):
            cache.update_conv_state(0, torch.zeros(shape), here)
    for positions in (torch.tensor(0), torch.tensor([[0]]), torch.tensor([0.0]), 0, None):
        with pytest.raises(InputError, match="cache_position must be a 1-D tensor of integers"):
            cache.update_conv_state(0, new, positions)
    with pytest.raises(InputError, match=r">= 0, got -1"):
        cache.update_conv_state(0, new, torch.tensor([-1]))
    with pytest.raises(InputError, match=r"new_ssm_state must have shape \(2, 16, 5\)"):
        cache.update_ssm_state(0, torch.zeros(2, E, N + 1))


def test_reset_forgets_in_place() -> None:
    cache = filled(2)
    addresses = [block.data_ptr() for block in blocks(cache)]
    cache.reset()
    assert [block.data_ptr() for block in blocks(cache)] == addresses
    assert_equal(cache, MambaCache(CONFIG, 2, dtype=torch.float32))
    assert not cache.has_previous_state()


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize(
    "copied",
    [MambaCache.clone, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["clone", "deepcopy", "pickle"],
)
def test_a_copy_is_equal_and_shares_nothing(batch: int, copied: object) -> None:
    cache = filled(batch)
    original = [block.clone() for block in blocks(cache)]
    other = copied(cache)
    assert_equal(other, cache)
    other.reset()
    assert_each(torch.equal, blocks(cache), original)


def test_to_changes_the_window_s_type_alone() -> None:
    cache = filled(2)
    assert cache.to("cpu") is cache
    assert cache.to(dtype=torch.float32) is cache
    for narrow in (cache.to(dtype=torch.bfloat16), cache.to(torch.bfloat16)):
        assert torch.equal(narrow.conv_states, cache.conv_states.bfloat16())
        assert torch.equal(narrow.ssm_states, cache.ssm_states)
        assert cache.dtype == torch.float32
    there = cache.to("meta")
    assert {block.device.type for block in blocks(there)} == {"meta"}
    assert cache.device.type == "cpu"


@settings(deadline=None)
@given(batch=st.integers(0, 4), data=st.data())
def test_rows_are_reordered_repeated_and_selected_as_lists_are(
    batch: int, data: st.DataObject
) -> None:
    def rows_of(cache: MambaCache) -> list[tuple[Tensor, ...]]:
        # Copies: what is in place must not change what was expected of it.
        return [
            (cache.conv_states[:, i].clone(), cache.ssm_states[:, i].clone(), count)
            for i, count in enumerate(cache.token_counts.clone())
        ]

    def check(cache: MambaCache, expected: list[tuple[Tensor, ...]]) -> None:
        assert cache.batch_size == cache.max_batch_size == len(expected)
        for row, wanted in zip(rows_of(cache), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(row, wanted, strict=True))
        assert all(block.is_contiguous() for block in blocks(cache))

    cache = filled(batch)
    rows = rows_of(cache)
    addresses = [block.data_ptr() for block in blocks(cache)]
    some_row = st.integers(0, max(batch - 1, 0))
    order = data.draw(st.lists(some_row, min_size=batch, max_size=batch))
    cache.reorder_cache(torch.tensor(order, dtype=torch.long))
    rows = [rows[i] for i in order]
    check(cache, rows)
    assert [block.data_ptr() for block in blocks(cache)] == addresses

    repeats = data.draw(st.integers(1, 3))
    cache.batch_repeat_interleave(repeats)
    rows = [row for row in rows for _ in range(repeats)]
    check(cache, rows)

    keep = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    as_mask = cache.clone()
    as_mask.batch_select_indices(torch.tensor(keep, dtype=torch.bool))
    indices = [i for i, kept in enumerate(keep) if kept]
    cache.batch_select_indices(torch.tensor(indices, dtype=torch.long))
    check(cache, [rows[i] for i in indices])
    check(as_mask, [rows[i] for i in indices])


def test_what_generate_asks_of_a_cache() -> None:
    cache = MambaCache(CONFIG, 2)
    assert isinstance(cache, Cache)
    assert len(cache) == N_LAYER
    assert cache.is_compileable
    assert cache.is_initialized
    assert not cache.is_croppable
    assert cache.is_linear == [True] * N_LAYER
    assert cache.is_sliding == cache.is_dummy == [False] * N_LAYER
    assert cache.get_max_length() == cache.get_max_length(0) == -1
    assert not cache.is_recording_past(0)
    assert (cache.get_seq_length(), cache.get_mask_sizes(7, 0)) == (0, (7, 0))
    assert not cache.has_previous_state()
    cache.token_counts += torch.tensor([3, 5])
    assert (cache.get_seq_length(), cache.get_mask_sizes(7, 0)) == (5, (12, 0))
    assert cache.get_query_offset() == 5
    assert cache.has_previous_state(1)
    before = copy.deepcopy(cache)
    cache.early_initialization(2, 1, 1, torch.float32, torch.device("cpu"))
    cache.offload(0)
    cache.prefetch(0)
    assert_equal(cache, before)
    assert (cache.conv_kernel_size, cache.intermediate_size, cache.ssm_state_size) == (K, E, N)
    assert cache.config is CONFIG
    assert "tokens=[3, 5]" in repr(cache)


def test_every_public_name_of_a_transformers_cache_was_thought_of() -> None:
    """A name this class does not define would work on an empty list of layers, in silence."""
    fine_as_inherited = {"get_query_offset"}  # asks get_seq_length
    nothing_to_do_with_a_state = {"update_indexer"}
    inherited = {name for name in vars(Cache) if not name.startswith("_")}
    unchanged = {name for name in inherited if getattr(MambaCache, name) is getattr(Cache, name)}
    assert unchanged <= fine_as_inherited | nothing_to_do_with_a_state


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda cache: cache.crop(-1), "cannot forget tokens"),
        (lambda cache: cache.activate_past_recording(), "cannot be rolled back"),
        (lambda cache: cache.update(torch.ones(1), torch.ones(1), 0), "no keys and values"),
    ],
)
def test_what_a_state_cannot_do_is_refused(call: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        call(filled(1))


# Files.


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(0, 3), seed=st.integers(0, 9), bits=st.sampled_from([16, 32]))
def test_a_file_gives_the_state_back(
    tmp_path_factory: pytest.TempPathFactory, batch: int, seed: int, bits: int
) -> None:
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    cache = filled(batch, torch.bfloat16 if bits == 16 else torch.float32, seed)
    cache.save(path)
    assert_equal(MambaCache.load(path, config=CONFIG), cache)
    cache.reset()
    cache.save(str(path))
    assert_equal(MambaCache.load(path, config=CONFIG), cache)


def test_a_file_is_a_header_and_two_blocks(tmp_path: Path) -> None:
    cache = filled(2)
    cache.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert set(file.keys()) == {"conv_states", "ssm_states"}
        metadata = file.metadata()
    assert json.loads(metadata["model"]) == model_identity(CONFIG)
    assert json.loads(metadata["token_counts"]) == cache.token_counts.tolist()
    # Two blocks of float32, and a header that does not grow with the state.
    size = (tmp_path / "state.safetensors").stat().st_size
    assert size - 4 * 2 * N_LAYER * E * (K + N) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 2),
        ("hidden_size", 16),
        ("state_size", 4),
        ("conv_kernel", 3),
        ("expand", 4),
    ],
)
def test_another_model_s_state_is_refused(tmp_path: Path, name: str, value: int) -> None:
    filled(1).save(tmp_path / "state")
    other = MambaConfig.from_dict(CONFIG.to_dict(), **{name: value})
    field = "intermediate_size" if name == "expand" else name
    message = refusal(StateError, MambaCache.load, tmp_path / "state", config=other)
    assert re.search(f"{field}=.*this model has {field}=", message)


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(CONFIG)


def test_the_weights_digest_is_checked_where_both_sides_know_it(
    tmp_path: Path, model: MambaForCausalLM
) -> None:
    cache = filled(1)
    cache.save(tmp_path / "state", model=model)
    assert_equal(MambaCache.load(tmp_path / "state", model=model), cache)
    assert_equal(MambaCache.load(tmp_path / "state", config=CONFIG), cache)
    # The backbone alone is the same model: its tied head adds no weight.
    assert_equal(MambaCache.load(tmp_path / "state", model=model.backbone), cache)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.layers[0].mixer.D[0] += 1e-3
    assert "digest" in refusal(StateError, MambaCache.load, tmp_path / "state", model=other)
    cache.save(tmp_path / "state")
    assert_equal(MambaCache.load(tmp_path / "state", model=other), cache)


def test_a_loaded_state_continues_the_text(tmp_path: Path, model: MambaForCausalLM) -> None:
    ids = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :7], use_cache=True).cache
        first.save(tmp_path / "state", model=model)
        loaded = MambaCache.load(tmp_path / "state", model=model)
        rest = model(ids[:, 7:], cache=loaded).logits
    # The design's bound for a cut anywhere, in float32.
    bound = 1e-4 * max(1.0, float(whole.abs().max()))
    assert torch.allclose(rest, whole[:, 7:], rtol=0, atol=bound)
    assert loaded.token_counts.tolist() == [12, 12]


def test_saving_with_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, model: MambaForCausalLM
) -> None:
    small = MambaModel(MambaConfig(vocab_size=4, hidden_size=4, num_hidden_layers=1))
    with pytest.raises(StateError, match="num_hidden_layers=3, this model has num_hidden_layers=1"):
        filled(1).save(tmp_path / "state", model=small)
    assert list(tmp_path.iterdir()) == []


def test_load_wants_one_of_config_and_model(tmp_path: Path, model: MambaForCausalLM) -> None:
    for arguments in ({}, {"config": CONFIG, "model": model}):
        with pytest.raises(InputError, match="either the config or the model"):
            MambaCache.load(tmp_path / "state", **arguments)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(1)
    cache.save(tmp_path / "state")

    def fails(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("anymamba.modeling.state.save_file", fails)
    with pytest.raises(OSError, match="the disk is full"):
        filled(1, seed=1).save(tmp_path / "state")
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert_equal(MambaCache.load(tmp_path / "state", config=CONFIG), cache)
