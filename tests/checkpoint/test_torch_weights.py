"""Loading weights: every layout to the same tensors, everything broken to one line."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anymamba.checkpoint import (
    expected_shapes,
    load_torch_state_dict,
    open_checkpoint,
    torch_weights,
)
from anymamba.errors import CheckpointError
from tests.support import files
from tests.support.layouts import (
    TRANSFORMERS_CONFIG,
    renamed,
    weights,
    write_config,
    write_index,
    write_model,
    write_shards,
)


def load(folder):
    return load_torch_state_dict(open_checkpoint(folder))


def refusal(folder) -> str:
    message = files.refusal(CheckpointError, load, folder)
    assert "weights_only" not in message
    return message


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
def test_each_layout(tmp_path, layout, pickled):
    assert_equal(load(write_model(tmp_path, layout, pickled=pickled)), weights())


@pytest.mark.parametrize("pickled", [False, True])
def test_shards(tmp_path, pickled):
    write_shards(tmp_path, pickled=pickled)
    assert_equal(load(tmp_path), weights())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux shows what is mapped")
@pytest.mark.parametrize("stays_mapped", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_no_file_stays_mapped_on_windows(tmp_path, monkeypatch, pickled, stays_mapped):
    """There it could be neither saved over nor removed while the model is there."""
    monkeypatch.setattr(torch_weights, "_STAYS_MAPPED", stays_mapped)
    found = load(write_model(tmp_path, "transformers", pickled=pickled))
    mapped = str(tmp_path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert mapped == stays_mapped
    assert_equal(found, weights())


def test_a_bare_backbone(tmp_path):
    bare = {name.removeprefix("backbone."): tensor for name, tensor in weights().items()}
    assert_equal(load(write_model(tmp_path, tensors=bare)), weights())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pickled", [False, True])
def test_types_are_kept(tmp_path, dtype, pickled):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    assert_equal(load(write_model(tmp_path, tensors=tensors, pickled=pickled)), tensors)


def test_pickles_of_old_torch(tmp_path):
    write_config(tmp_path, TRANSFORMERS_CONFIG)
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights(), file, _use_new_zipfile_serialization=False)
    assert_equal(load(tmp_path), weights())


def test_parameters_become_plain_tensors(tmp_path):
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights().items()}
    loaded = load(write_model(tmp_path, tensors=parameters, pickled=True))
    assert not any(tensor.requires_grad for tensor in loaded.values())


@pytest.mark.parametrize("sharded", [False, True])
def test_what_transformers_writes(tmp_path, sharded):
    transformers = pytest.importorskip("transformers")
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**TRANSFORMERS_CONFIG))
    model.save_pretrained(tmp_path, max_shard_size="2KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").exists() != sharded
    expected = dict(model.state_dict())
    del expected["lm_head.weight"]
    assert_equal(load(tmp_path), expected)


def test_what_transformers_writes_of_a_bare_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.MambaModel(transformers.MambaConfig(**TRANSFORMERS_CONFIG))
    model.save_pretrained(tmp_path)
    expected = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    assert_equal(load(tmp_path), expected)


@pytest.mark.parametrize("pickled", [False, True])
def test_what_minimal_holds(tmp_path, pickled):
    from anymamba.minimal import Mamba, ModelArgs

    model = Mamba(ModelArgs(d_model=6, n_layer=2, vocab_size=13, d_state=5, dt_rank=3))
    write_model(tmp_path, "minimal", model.state_dict(), pickled=pickled)
    loaded = load(tmp_path)
    assert_equal(renamed("minimal", loaded), dict(model.state_dict()))


class TestHead:
    def untied(self):
        return weights() | {"lm_head.weight": torch.ones(16, 6)}

    @pytest.mark.parametrize("pickled", [False, True])
    def test_of_its_own(self, tmp_path, pickled):
        folder = write_model(
            tmp_path, tensors=self.untied(), pickled=pickled, tie_word_embeddings=False
        )
        assert_equal(load(folder), self.untied())

    def test_missing(self, tmp_path):
        folder = write_model(tmp_path, tie_word_embeddings=False)
        assert "missing lm_head.weight" in refusal(folder)

    @pytest.mark.parametrize("pickled", [False, True])
    def test_of_its_own_in_a_tied_model(self, tmp_path, pickled):
        folder = write_model(tmp_path, tensors=self.untied(), pickled=pickled)
        assert "tie_word_embeddings" in refusal(folder)

    def test_of_another_shape_in_a_tied_model(self, tmp_path):
        folder = write_model(tmp_path, tensors=weights() | {"lm_head.weight": torch.ones(2)})
        assert "tie_word_embeddings" in refusal(folder)

    def test_not_asked_for(self, tmp_path):
        folder = write_model(tmp_path, tensors=self.untied(), tie_word_embeddings=False)
        backbone = expected_shapes(TRANSFORMERS_CONFIG)
        assert_equal(load_torch_state_dict(open_checkpoint(folder), backbone), weights())


@pytest.mark.parametrize("pickled", [False, True])
def test_all_differences_in_one_line(tmp_path, pickled):
    tensors = weights()
    del tensors["backbone.layers.0.mixer.D"]
    tensors["backbone.norm_f.weight"] = torch.ones(7)
    tensors["backbone.layers.0.mixer.steps"] = torch.tensor(3)
    message = refusal(write_model(tmp_path, tensors=tensors, pickled=pickled))
    assert "missing backbone.layers.0.mixer.D" in message
    assert "unexpected 'backbone.layers.0.mixer.steps'" in message
    assert "backbone.norm_f.weight is 7, expected 6" in message


@pytest.mark.parametrize("pickled", [False, True])
def test_integers_are_no_weights(tmp_path, pickled):
    tensors = weights() | {"backbone.norm_f.weight": torch.ones(6, dtype=torch.int8)}
    message = refusal(write_model(tmp_path, tensors=tensors, pickled=pickled))
    assert "backbone.norm_f.weight" in message
    assert "int8" in message


def test_a_shard_without_what_the_index_says(tmp_path):
    index = write_shards(tmp_path, pickled=True)
    write_index(tmp_path, index | {"backbone.extra": index["backbone.norm_f.weight"]})
    assert "it lacks 'backbone.extra'" in refusal(tmp_path)


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["archive", "old torch", "pickle 2", "pickle 5"])
def test_a_pickle_that_would_run_code(tmp_path, form):
    marker = tmp_path / "ran"
    write_config(tmp_path, TRANSFORMERS_CONFIG)
    file = tmp_path / "pytorch_model.bin"
    value = weights() | {"backbone.norm_f.weight": RunsCode(marker)}
    if form.startswith("pickle"):
        file.write_bytes(pickle.dumps(RunsCode(marker), protocol=int(form[-1])))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=form == "archive")
    message = refusal(tmp_path)
    assert not marker.exists()
    assert "safetensors" in message
    if form != "pickle 5":  # torch's reader stops at an earlier sign
        assert "would run code" in message
        assert "mkdir" in message


@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_pickle(tmp_path, old):
    write_config(tmp_path, TRANSFORMERS_CONFIG)
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights(), file, _use_new_zipfile_serialization=not old)
    whole = file.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 40)
    for length in [0, 1, 2, 3, 4, len(whole) - 1, *places]:
        file.write_bytes(whole[:length])
        assert "pytorch_model.bin" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({"state_dict": {"x": torch.ones(2)}}, "'state_dict'"),
        ({3: torch.ones(2)}, "holds 3"),
        ({"x": torch.ones(2, 2).to_sparse()}, "'x', which is no plain tensor"),
        ({"x": torch.ones(2, device="meta")}, "'x', which is no plain tensor"),
    ],
)
def test_pickles_of_something_else(tmp_path, value, said):
    write_config(tmp_path, TRANSFORMERS_CONFIG)
    torch.save(value, tmp_path / "pytorch_model.bin")
    assert said in refusal(tmp_path)


def test_a_pointer_of_git_lfs_instead_of_the_file(tmp_path):
    write_config(tmp_path, TRANSFORMERS_CONFIG)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "pytorch_model.bin").write_bytes(pointer)
    assert "fetch it again" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pointer)
    assert "may not be a safetensors file" in refusal(tmp_path)


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path))
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "model.safetensors" in files.refusal(CheckpointError, load_torch_state_dict, checkpoint)
