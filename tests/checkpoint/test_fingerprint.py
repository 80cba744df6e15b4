"""One identity for one set of weights, however it is stored."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from anymamba.checkpoint import bytes_digest, checkpoint_digest, open_checkpoint, state_dict_digest
from anymamba.errors import CheckpointError
from tests.support.files import refusal
from tests.support.layouts import renamed, weights, write_model, write_shards


def test_as_documented():
    """Computed a second time here, from plain bytes."""
    values = struct.pack("<3f", 1.1, 2.0, 3.0)
    head = struct.pack("<2b", 1, 0)
    listing = [
        ["backbone.norm_f.weight", ["F32", [3], hashlib.sha256(values).hexdigest()]],
        ["lm_head.weight", ["BOOL", [1, 2], hashlib.sha256(head).hexdigest()]],
    ]
    expected = hashlib.sha256(json.dumps(listing, separators=(",", ":")).encode()).hexdigest()
    tensors = {
        "lm_head.weight": torch.tensor([[True, False]]),
        "norm_f.weight": torch.tensor([1.1, 2.0, 3.0]),
    }
    assert state_dict_digest(tensors) == expected


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_for_every_layout(tmp_path, layout, pickled, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    folder = write_model(tmp_path, layout, renamed(layout, tensors), pickled=pickled)
    assert checkpoint_digest(open_checkpoint(folder)) == state_dict_digest(tensors)


def test_the_same_for_bfloat16_and_the_float32_it_widens_to(tmp_path):
    """A bfloat16 model that is loaded as float32 is the same model."""
    tensors = {name: tensor.bfloat16() for name, tensor in weights().items()}
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    assert state_dict_digest(wide) == state_dict_digest(tensors) != state_dict_digest(weights())
    assert checkpoint_digest(open_checkpoint(write_model(tmp_path, tensors=wide))) == (
        state_dict_digest(tensors)
    )


@pytest.mark.parametrize("place", [0, 299_999, 300_000, 699_999])
def test_one_number_beyond_bfloat16_makes_another(place):
    """Wherever it stands in the megabytes that are looked at one after the other."""
    tensor = torch.ones(700_000)
    tensor[place] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    digest = state_dict_digest({"norm_f.weight": tensor})
    assert digest != state_dict_digest({"norm_f.weight": torch.ones(700_000)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_for_bytes_in_memory(dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    parts = {
        name: (names[dtype], tuple(t.shape), memoryview(t.view(torch.uint8).numpy().tobytes()))
        for name, t in tensors.items()
    }
    assert bytes_digest(parts) == state_dict_digest(tensors)


def test_the_same_for_shards(tmp_path):
    write_shards(tmp_path)
    assert checkpoint_digest(open_checkpoint(tmp_path)) == state_dict_digest(weights())


def test_the_same_however_memory_lies():
    plain = state_dict_digest(weights())
    assert state_dict_digest(dict(reversed(weights().items()))) == plain
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights().items()}
    assert state_dict_digest(parameters) == plain
    strided = {
        name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in weights().items()
    }
    assert state_dict_digest(strided) == plain


def test_a_head_counts_unless_it_repeats_the_embeddings():
    plain = state_dict_digest(weights())
    table = weights()["backbone.embeddings.weight"]
    assert state_dict_digest(weights() | {"lm_head.weight": table}) == plain
    assert state_dict_digest(weights() | {"lm_head.weight": table + 1}) != plain


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "name", "missing"])
def test_another_for_other_weights(change):
    tensors = weights()
    name = "backbone.layers.1.mixer.D"
    match change:
        case "value":
            tensors[name][3] = torch.nextafter(tensors[name][3], torch.tensor(9.0))
        case "dtype":
            tensors[name] = tensors[name].view(torch.int32)
        case "shape":
            tensors[name] = tensors[name].view(3, 4)
        case "name":
            tensors["backbone.layers.2.mixer.D"] = tensors.pop(name)
        case "missing":
            del tensors[name]
    assert state_dict_digest(tensors) != state_dict_digest(weights())


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse(), torch.ones(2) * 1j]
)
def test_no_plain_bytes(tensor):
    assert "'x'" in refusal(CheckpointError, state_dict_digest, {"x": tensor})


def test_a_file_cut_after_it_was_opened(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "became shorter" in refusal(CheckpointError, checkpoint_digest, checkpoint)


def test_more_than_one_chunk(tmp_path):
    """The files above fit in one read; this one does not."""
    tensors = {"norm_f.weight": torch.arange(700_000, dtype=torch.float32)}
    write_model(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint_digest(open_checkpoint(tmp_path)) == state_dict_digest(tensors)
