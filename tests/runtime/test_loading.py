"""`load` opens every layout that `from_pretrained` opens, and says what it cannot open."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import anymamba
from anymamba import _core
from anymamba.arithmetic import load_core
from anymamba.checkpoint.safetensors.header import read_header
from anymamba.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    HubError,
    InputError,
    MissingDependencyError,
)
from anymamba.processors import quota_of_processors
from tests.support.files import SMALL, small_weights, write_small
from tests.support.reference import reference_logits, words
from tests.support.tolerance import assert_same

SIZES = {"d_model": 24, "n_layer": 2, "vocab_size": 61}
LAYER = {"d_state": 5, "dt_rank": 3}
IDS = words(20)


def expected() -> np.ndarray:
    return reference_logits(small_weights(), IDS)


def test_the_original_layout(tmp_path: Path) -> None:
    config = SIZES | {"ssm_cfg": LAYER, "pad_vocab_size_multiple": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {n.replace("embeddings", "embedding"): t for n, t in small_weights().items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    engine = anymamba.load(tmp_path)
    assert_same(engine.logits(IDS), expected())
    # Transformers' default for a config that names no end.
    assert engine.end_ids == (0,)
    assert engine.config["hidden_size"] == 24


def test_the_minimal_layout(tmp_path: Path) -> None:
    config = SIZES | LAYER | {"pad_vocab_size_multiple": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {
        n: n.replace("embeddings", "embedding").removeprefix("backbone.") for n in small_weights()
    }
    save_file({names[n]: t for n, t in small_weights().items()}, tmp_path / "model.safetensors")
    assert_same(anymamba.load(tmp_path).logits(IDS), expected())


def test_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    tensors, index = small_weights(), {}
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(anymamba.load(tmp_path).logits(IDS), expected())


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_unaligned_weights(tmp_path: Path, shift: int) -> None:
    write_small(tmp_path)
    file = tmp_path / "model.safetensors"
    begin = min(record.begin for record in read_header(file).tensors.values())
    whole = file.read_bytes()
    text = whole[8:begin] + b" " * ((shift - begin) % 4)
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[begin:])
    assert_same(anymamba.load(tmp_path).logits(IDS), expected())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stored_types(tmp_path: Path, dtype: type) -> None:
    """float16 rounds the weights by 2^-11, which moves the logits by less than 2e-2 of them."""
    engine = anymamba.load(write_small(tmp_path, dtype=dtype))
    rounded = {name: tensor.astype(dtype) for name, tensor in small_weights().items()}
    assert_same(engine.logits(IDS), reference_logits(rounded, IDS), 1e-4)


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "int4"])
def test_kinds(tmp_path: Path, kind: str) -> None:
    """A model whose widths no group divides becomes bfloat16 where it would be quantized."""
    engine = anymamba.load(write_small(tmp_path), weights=kind)
    assert engine.weight_type == kind
    tolerance = 1e-4 if kind == "f32" else 2e-2  # the contract's for float32 and bfloat16
    assert_same(engine.logits(IDS), expected(), tolerance)


def test_facts(tmp_path: Path) -> None:
    engine = anymamba.load(write_small(tmp_path), threads=1)
    size = sum(tensor.size for tensor in small_weights().values())
    assert (engine.n_parameters, engine.weight_bytes, engine.threads) == (size, 4 * size, 1)
    assert engine.config == SMALL
    assert repr(engine) == "Engine(11,136 parameters, f32, 1 threads)"


def test_a_tokenizer_of_another_folder(tmp_path: Path) -> None:
    from anymamba.assets import bundled_model

    write_small(tmp_path, vocab_size=256)
    for place in (bundled_model(), str(bundled_model() / "tokenizer.json")):
        assert anymamba.load(tmp_path, tokenizer=place).tokenize("Hi") == [72, 105]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        anymamba.load(tmp_path, tokenizer=tmp_path).tokenize("Hi")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        anymamba.load(tmp_path).tokenize("Hi")


def test_a_tokenizer_cuts_nothing_off(tmp_path: Path) -> None:
    """What a trainer left in tokenizer.json about the lengths of its batches does not count."""
    from anymamba.assets import bundled_model

    write_small(tmp_path, vocab_size=256)
    fields = json.loads((bundled_model() / "tokenizer.json").read_text())
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert anymamba.load(tmp_path).tokenize("ROMEO:") == list(b"ROMEO:")


# What is refused.


@pytest.mark.parametrize("kind", ["int3", "", None, 4])
def test_no_such_kind(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=f"weights must be one of auto, f32, bf16, int8, int4, got {kind!r}"
    ):
        anymamba.load(weights=kind)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 10**9])
def test_no_such_number_of_threads(threads: int) -> None:
    with pytest.raises(InputError, match="threads must be a whole number"):
        anymamba.load(threads=threads)


def test_threads_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYMAMBA_NUM_THREADS", raising=False)
    script = "from anymamba import _core; print(_core.threads())"  # which counts by itself
    counted = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert _core.default_threads() == int(counted.stdout)
    quota = quota_of_processors()
    allowed = int(counted.stdout) if quota is None else max(1, round(quota))
    assert anymamba.load().threads == min(int(counted.stdout), allowed)
    monkeypatch.setenv("ANYMAMBA_NUM_THREADS", "1")
    assert anymamba.load().threads == 1
    assert anymamba.load(threads=2).threads == 2
    monkeypatch.setenv("ANYMAMBA_NUM_THREADS", "many")
    with pytest.raises(BackendError, match="ANYMAMBA_NUM_THREADS is 'many'"):
        anymamba.load()
    for many in ("1000000000", "9" * 5000):
        monkeypatch.setenv("ANYMAMBA_NUM_THREADS", many)
        with pytest.raises(BackendError, match="1 to 1024"):
            anymamba.load()


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        anymamba.load(tmp_path / "nowhere")
    with pytest.raises(HubError):
        anymamba.load("nobody/nothing", offline=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon 'small'"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon -1"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon nan"),
    ],
)
def test_what_the_core_does_not_compute(tmp_path: Path, fields: dict, reason: str) -> None:
    write_small(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | fields))
    with pytest.raises(CheckpointError, match=reason):
        anymamba.load(tmp_path)


def test_without_the_native_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anymamba._core", None)
    load_core.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"C\+\+ compiler.*anymamba\[torch\]"):
        anymamba.load()
    monkeypatch.undo()
    load_core.cache_clear()
    anymamba.load()


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    write_small(tmp_path)
    script = (
        "import sys, anymamba; ids = list(map(int, sys.argv[2].split()))\n"
        "print(anymamba.load(sys.argv[1]).generate(ids, 20).ids)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), " ".join(map(str, IDS))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    own = anymamba.load(tmp_path).generate(IDS, 20).ids
    for process in running:
        assert json.loads(process.communicate(timeout=60)[0]) == own


@pytest.mark.parametrize("kind", ["auto", "f32"])
def test_a_gguf_file(tmp_path: Path, kind: str) -> None:
    from anymamba.assets import bundled_model
    from anymamba.runtime.convert.conversion import convert

    convert(bundled_model(), tmp_path / "model.gguf", "gguf")
    engine, own = anymamba.load(tmp_path / "model.gguf", kind), anymamba.load(weights="f32")
    assert engine.tokenize("ROMEO:") == own.tokenize("ROMEO:")
    assert engine.end_ids == ()
    # The file keeps bfloat16 where we do, and A in place of its logarithm.
    assert_same(engine.logits("ROMEO:"), own.logits("ROMEO:"), 1e-4 if kind == "f32" else 2e-2)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        anymamba.load(str(tmp_path / "model.gguf"), tokenizer=tmp_path).tokenize("Hi")
