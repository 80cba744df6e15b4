"""Finding the weight files: preferences, shards, hostile indices."""

import json
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.checkpoint.files import find_weight_files
from anymamba.errors import CheckpointError
from tests.support import files
from tests.support.files import one_line

PREFERENCE = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]


refusal = partial(files.refusal, CheckpointError, find_weight_files)


@pytest.mark.parametrize("first", range(4))
def test_preference(tmp_path, first):
    for name in PREFERENCE[first:]:
        shard = f"a{'.bin' if '.bin' in name else '.safetensors'}"
        (tmp_path / shard).write_bytes(b"")
        (tmp_path / name).write_text(json.dumps({"weight_map": {"x": shard, "y": shard}}))
    files = find_weight_files(tmp_path)
    assert files.pickled == (first >= 2)
    wanted = ["model.safetensors", "a.safetensors", "pytorch_model.bin", "a.bin"][first]
    assert files.paths == (tmp_path / wanted,)
    assert (files.index is not None) == (first in (1, 3))


def test_nothing_there(tmp_path):
    assert "found nothing at all" in refusal(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    message = refusal(tmp_path)
    assert "'tf_model.h5'" in message
    assert all(name in message for name in PREFERENCE)


def test_a_missing_shard_is_named(tmp_path):
    index = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / index["x"]).write_bytes(b"")
    message = refusal(tmp_path)
    assert "'model-00002-of-00002.safetensors'" in message
    assert "00001" not in message


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "nul\0.safetensors",
        "model.bin",
        "model.safetensors.index.json",
        "",
        "..",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_shards_stay_in_the_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    message = refusal(folder)
    assert "plain name" in message
    assert "'x'" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {}, "a": 1, "a": 2}',
    ],
)
def test_a_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12) | st.builds("{}.safetensors".format, st.text(max_size=12)))
def test_no_name_leaves_the_folder(tmp_path_factory, shard):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    try:
        if shard.endswith(".safetensors") and len(shard) < 30:
            (folder / shard).write_bytes(b"")
    except (OSError, ValueError):
        pass
    try:
        (path,) = find_weight_files(folder).paths
    except CheckpointError as error:
        one_line(error)
    else:
        assert path.parent.resolve() == path.resolve().parent == folder.resolve()
