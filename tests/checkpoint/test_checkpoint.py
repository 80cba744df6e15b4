"""Opening folders of every layout, whole and broken."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from anymamba.checkpoint import open_checkpoint
from anymamba.errors import CheckpointError
from tests.support import files
from tests.support.layouts import weights, write_index, write_model, write_shards

refusal = partial(files.refusal, CheckpointError, open_checkpoint)


@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
def test_every_tensor_is_where_the_record_says(tmp_path, layout):
    checkpoint = open_checkpoint(write_model(tmp_path, layout))
    assert checkpoint.layout == layout
    assert not checkpoint.pickled
    stored = dict(checkpoint.tensors)
    if layout != "transformers":
        assert stored.pop("lm_head.weight").shape == (16, 6)
    assert stored.keys() == weights().keys()
    for name, record in stored.items():
        data = record.file.read_bytes()[record.begin : record.end]
        found = torch.frombuffer(bytearray(data), dtype=torch.float32).view(record.shape)
        assert torch.equal(found, weights()[name])


def test_shards(tmp_path):
    index = write_shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {name: record.file.name for name, record in checkpoint.tensors.items()} == index
    assert len(checkpoint.files.paths) == 2


def test_pickles_are_not_touched(tmp_path):
    write_model(tmp_path, pickled=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.pickled
    assert checkpoint.tensors == {}


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    index = write_shards(tmp_path)
    first, second = sorted(set(index.values()))
    name = next(name for name, file in index.items() if file == first)
    write_index(tmp_path, index | {name: second})
    assert f"the index does not place there {name!r}" in refusal(tmp_path)
    write_index(tmp_path, {tensor: file for tensor, file in index.items() if tensor != name})
    assert f"the index does not place there {name!r}" in refusal(tmp_path)
    write_index(tmp_path, index | {"backbone.extra": second})
    assert "lacks 'backbone.extra'" in refusal(tmp_path)


def test_two_names_for_one_tensor(tmp_path):
    write_model(tmp_path)
    table = torch.zeros(16, 6)
    twice = {"embedding.weight": table, "backbone.embeddings.weight": table.clone()}
    save_file(twice, tmp_path / "model.safetensors")
    assert "'embedding.weight'" in refusal(tmp_path)


def test_no_folder(tmp_path):
    assert "no folder" in refusal(tmp_path / "nowhere")


def test_truncated(tmp_path):
    file = write_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in refusal(tmp_path)
