"""Conversions: nothing is lost, nothing is half written, nothing of others is deleted."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anymamba.checkpoint import checkpoint_digest, open_checkpoint
from anymamba.checkpoint.architecture import is_matrix
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.errors import AnyMambaError, CheckpointError, ConfigError, MissingDependencyError
from anymamba.runtime.convert.conversion import convert
from tests.support import files, gguf_files
from tests.support.files import CONFIG, entries, peak_memory, types_in

FOLDERS = ["transformers", "original", "minimal"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return files.write_folder(tmp_path / "source")


def refusal(kind: type[AnyMambaError], *arguments: Any, **options: Any) -> str:
    return files.refusal(kind, convert, *arguments, **options)


# Layouts


@pytest.mark.parametrize("second", FOLDERS)
@pytest.mark.parametrize("first", FOLDERS)
def test_a_model_goes_through_all_layouts(first: str, second: str, source: Path) -> None:
    one = convert(source, source.parent / "one", first)
    two = convert(one, source.parent / "two", second)
    back = convert(two, source.parent / "back")
    assert open_checkpoint(two).layout == second
    expected = files.tensors()
    stored = load_file(back / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(np.array_equal(stored[name], expected[name]) for name in expected)
    config = json.loads((back / "config.json").read_text())
    assert CONFIG.items() <= (config | {"layer_norm_epsilon": 1e-5}).items()
    assert config["dtype"] == "float32"
    digests = {checkpoint_digest(open_checkpoint(folder)) for folder in (source, one, two, back)}
    assert len(digests) == 1


def test_the_names_are_those_of_the_layouts_programs(source: Path) -> None:
    """Spelt out: the embedding table and, where the programs want one, the head."""
    original = convert(source, source.parent / "original", "original")
    minimal = convert(source, source.parent / "minimal", "minimal")
    names = set(files.tensors())
    renamed = {name.replace("embeddings", "embedding") for name in names} | {"lm_head.weight"}
    assert set(types_in(original)) == renamed
    assert set(types_in(minimal)) == {name.removeprefix("backbone.") for name in renamed}
    assert json.loads((original / "config.json").read_text())["ssm_cfg"] == {
        "d_state": 5,
        "d_conv": 4,
        "expand": 2,
        "dt_rank": 3,
        "conv_bias": True,
        "bias": False,
    }


@pytest.mark.parametrize("layout", ["original", "minimal"])
def test_a_vocabulary_that_is_no_multiple_of_8_stays(layout: str, tmp_path: Path) -> None:
    """The programs of these layouts round vocabularies up, unless they are told not to."""
    stored = files.tensors()
    stored["backbone.embeddings.weight"] = stored["backbone.embeddings.weight"][:317]
    source = files.write_folder(tmp_path / "source", stored, vocab_size=317)
    back = convert(convert(source, tmp_path / "there", layout), tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["vocab_size"] == 317
    assert load_file(back / "model.safetensors")["backbone.embeddings.weight"].shape == (317, 32)


def test_minimal_itself_loads_the_minimal_layout(source: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    from anymamba.minimal import Mamba, ModelArgs

    folder = convert(source, source.parent / "minimal", "minimal")
    model = Mamba(ModelArgs(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_torch(folder / "model.safetensors"))
    expected = torch.tensor(files.tensors()["backbone.embeddings.weight"])
    assert torch.equal(model.lm_head.weight, expected)


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_an_untied_head_is_kept(layout: str, tmp_path: Path) -> None:
    source = files.write_folder(
        tmp_path / "source", files.tensors(tied=False), tie_word_embeddings=False
    )
    back = convert(convert(source, tmp_path / "there", layout), tmp_path / "back")
    stored = load_file(back / "model.safetensors")
    assert np.array_equal(stored["lm_head.weight"], files.tensors(False)["lm_head.weight"])
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False
    assert "head" in refusal(ConfigError, source, tmp_path / "minimal", "minimal")


def test_a_repeated_head_is_left_out_and_another_is_no_loss(tmp_path: Path) -> None:
    stored = files.tensors(tied=False)
    source = files.write_folder(tmp_path / "source", stored)
    assert "differ" in refusal(CheckpointError, source, tmp_path / "new")
    stored["lm_head.weight"] = stored["backbone.embeddings.weight"].copy()
    save_file(stored, source / "model.safetensors")
    assert "lm_head.weight" not in types_in(convert(source, tmp_path / "new"))


def test_what_belongs_to_the_model_goes_along(source: Path) -> None:
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (source / name).write_text("{}")
    (source / "diary.txt").write_text("secret")
    (source / "subfolder").mkdir()
    new = convert(source, source.parent / "new")
    assert entries(new) == sorted(set(entries(source)) - {"diary.txt", "subfolder"})
    for name in set(entries(new)) - {"config.json", "model.safetensors"}:
        assert (new / name).read_bytes() == (source / name).read_bytes()


def test_fields_of_a_transformers_config_stay(tmp_path: Path) -> None:
    changes = {"eos_token_id": 7, "torch_dtype": "float16", "initializer_range": 0.5}
    source = files.write_folder(tmp_path / "source", **changes)
    config = json.loads((convert(source, tmp_path / "new") / "config.json").read_text())
    assert (config["eos_token_id"], config["initializer_range"]) == (7, 0.5)
    assert "torch_dtype" not in config
    assert config["dtype"] == "float32"


# GGUF


@pytest.mark.parametrize("tied", [True, False])
def test_to_gguf_and_back(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    expected = files.tensors(tied)
    source = files.write_folder(
        tmp_path / "source", expected, tie_word_embeddings=tied, eos_token_id=0
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    back = convert(convert(source, tmp_path / "model.gguf", "gguf"), tmp_path / "back")
    stored = load_file(back / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("A_log"):  # through A: see test_gguf
            np.testing.assert_allclose(stored[name], tensor, rtol=2**-23, atol=2**-22)
        else:
            assert np.array_equal(stored[name], tensor), name
    assert (back / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}"
    config = json.loads((back / "config.json").read_text())
    assert (CONFIG | {"tie_word_embeddings": tied}).items() <= config.items()
    assert config["eos_token_id"] == 0


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_from_gguf_values_are_exact(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = gguf_files.write(tmp_path / "model.gguf", kind)
    folder = convert(file, tmp_path / "folder")
    name = "backbone.layers.0.mixer.out_proj.weight"
    raw = {t.name: t for t in gguf.GGUFReader(file).tensors}["blk.0.ssm_out.weight"]
    expected = gguf.dequantize(raw.data, raw.tensor_type)
    assert types_in(folder)[name] == {"F16": "F16", "BF16": "BF16"}.get(kind, "F32")
    wide = convert(file, tmp_path / "wide", weights="f32")
    assert np.array_equal(load_file(wide / "model.safetensors")[name], expected)


def test_gguf_keeps_the_type_of_the_matrices(source: Path) -> None:
    pytest.importorskip("gguf")
    half = convert(source, source.parent / "half", weights="bf16")
    file = convert(half, source.parent / "m.gguf", "gguf")
    records = read_gguf(file).tensors.records
    assert {record.dtype for name, record in records.items() if is_matrix(name)} == {"BF16"}
    small = convert(file, source.parent / "small.gguf", "gguf", "q4_0")
    again = convert(small, source.parent / "again.gguf", "gguf")
    records = read_gguf(again).tensors.records
    assert records["backbone.embeddings.weight"].dtype == "Q4_0"


# Types


@pytest.mark.parametrize("weights", ["f16", "bf16"])
def test_matrices_take_the_type_and_the_rest_keeps_its_own(weights: str, source: Path) -> None:
    folder = convert(source, source.parent / "new", weights=weights)
    types = types_in(folder)
    assert {kind for name, kind in types.items() if is_matrix(name)} == {weights.upper()}
    assert {kind for name, kind in types.items() if not is_matrix(name)} == {"F32"}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == {"f16": "float16", "bf16": "bfloat16"}[weights]
    again = convert(folder, source.parent / "again", weights=weights)
    same = [(f / "model.safetensors").read_bytes() for f in (folder, again)]
    assert same[0] == same[1]


def test_rounding_is_torchs(source: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    for weights, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        stored = load_torch(
            convert(source, source.parent / weights, weights=weights) / "model.safetensors"
        )
        for name, tensor in files.tensors().items():
            expected = torch.tensor(tensor).to(dtype) if is_matrix(name) else torch.tensor(tensor)
            assert torch.equal(stored[name], expected), name


def test_float32_all_over(tmp_path: Path) -> None:
    stored = {name: tensor.astype(np.float16) for name, tensor in files.tensors().items()}
    source = files.write_folder(tmp_path / "source", stored)
    wide = load_file(convert(source, tmp_path / "new", weights="f32") / "model.safetensors")
    assert all(np.array_equal(wide[name], stored[name].astype(np.float32)) for name in stored)
    assert {tensor.dtype for tensor in wide.values()} == {np.dtype(np.float32)}


def test_float64_becomes_float32(tmp_path: Path) -> None:
    stored = {name: tensor.astype(np.float64) / 3 for name, tensor in files.tensors().items()}
    source = files.write_folder(tmp_path / "source", stored)
    new = load_file(convert(source, tmp_path / "new") / "model.safetensors")
    assert all(np.array_equal(new[name], stored[name].astype(np.float32)) for name in stored)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    stored = files.tensors()
    stored["backbone.embeddings.weight"][0, 0] = 7e4
    source = files.write_folder(tmp_path / "source", stored)
    assert "float16" in refusal(ConfigError, source, tmp_path / "new", weights="f16")
    assert entries(tmp_path) == ["source"]


# Memory


@pytest.mark.parametrize("weights", [None, "bf16"])
@pytest.mark.parametrize("layout", FOLDERS)
def test_memory_holds_the_largest_tensor_and_not_the_model(
    layout: str, weights: str | None, source: Path, large: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "warm", layout)  # what is imported once does not count
    # The largest has 1 MB and a few copies in other types. Before that, config.json is read with
    # room for 8 MB.
    assert peak_memory(convert, large, tmp_path / "new", layout, weights) < 10e6


# Pickles


def pickled(source: Path, content: Any = None) -> Path:
    torch = pytest.importorskip("torch")
    tensors = {
        n: torch.tensor(t).bfloat16() for n, t in load_file(source / "model.safetensors").items()
    }
    torch.save(tensors if content is None else content, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    return source


def test_a_pickle_becomes_safetensors(source: Path) -> None:
    expected = convert(source, source.parent / "expected", weights="bf16")
    new = convert(pickled(source), source.parent / "new")
    types = types_in(new)
    assert set(types.values()) == {"BF16"}
    both = [convert(f, f.with_name(f.name + "32"), weights="f32") for f in (new, expected)]
    stored = [load_file(folder / "model.safetensors") for folder in both]
    for name in filter(is_matrix, types):
        assert np.array_equal(stored[0][name], stored[1][name])


class RunsCode:
    def __reduce__(self) -> Any:
        return print, ("owned",)


def test_a_pickle_that_runs_code_is_refused(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled(source, RunsCode())
    assert "run code" in refusal(CheckpointError, source, source.parent / "new")
    assert "owned" not in capsys.readouterr().out
    assert entries(source.parent) == ["source"]


def test_a_pickle_without_torch_says_what_to_install(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setattr("anymamba.checkpoint.source.find_spec", lambda name: None)
    message = refusal(MissingDependencyError, source, source.parent / "new")
    assert "anymamba[torch]" in message


# Refusing


@pytest.mark.parametrize(
    ("name", "layout", "weights", "word"),
    [
        ("new", "ggml", None, "'ggml'"),
        ("new", "transformers", "int8", "anymamba quantize"),
        ("new", "original", "q8_0", "'q8_0'"),
        ("m.gguf", "gguf", "int4", "q4_0"),
        ("new", "gguf", None, ".gguf"),
        ("new.gguf", "transformers", None, ".gguf"),
    ],
)
def test_choices_that_do_not_exist(
    name: str, layout: str, weights: str | None, word: str, source: Path
) -> None:
    assert word in refusal(ConfigError, source, source.parent / name, layout, weights)
    assert entries(source.parent) == ["source"]


@pytest.mark.parametrize("changes", [{"layer_norm_epsilon": 1e-6}, {"hidden_act": "gelu"}])
@pytest.mark.parametrize("layout", ["original", "minimal"])
def test_what_a_layout_cannot_say_is_refused(
    layout: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = files.write_folder(tmp_path / "source", **changes)
    assert next(iter(changes)) in refusal(ConfigError, source, tmp_path / "new", layout)
    assert entries(tmp_path) == ["source"]


def test_quantized_folders_are_refused(tmp_path: Path) -> None:
    source = files.write_folder(tmp_path / "source", quantization_config={"format": "anymamba"})
    assert "quantized" in refusal(CheckpointError, source, tmp_path / "new")


def test_broken_sources_leave_nothing(source: Path) -> None:
    stored = files.tensors()
    del stored["backbone.layers.1.mixer.D"]
    save_file(stored, source / "model.safetensors")
    assert "layers.1.mixer.D" in refusal(CheckpointError, source, source.parent / "new")
    (source / "tokenizer.json").write_bytes(b"\xff")
    assert "missing" in refusal(CheckpointError, source / "no.gguf", source.parent / "new")
    assert "does not exist" in refusal(CheckpointError, source / "no", source.parent / "new")
    assert entries(source.parent) == ["source"]


def test_integers_are_no_weights(tmp_path: Path) -> None:
    stored = files.tensors()
    stored["backbone.norm_f.weight"] = stored["backbone.norm_f.weight"].astype(np.int32)
    source = files.write_folder(tmp_path / "source", stored)
    assert "I32" in refusal(CheckpointError, source, tmp_path / "new")


# Places


def test_what_exists_stays(source: Path) -> None:
    new = convert(source, source.parent / "new")
    before = {name: (new / name).read_bytes() for name in entries(new)}
    assert "overwrite" in refusal(CheckpointError, source, new, weights="f16")
    assert before == {name: (new / name).read_bytes() for name in entries(new)}
    convert(source, new, weights="f16", overwrite=True)
    assert types_in(new)["backbone.embeddings.weight"] == "F16"
    assert entries(source.parent) == ["new", "source"]


def test_a_gguf_file_that_exists_stays(source: Path) -> None:
    pytest.importorskip("gguf")
    file = convert(source, source.parent / "m.gguf", "gguf")
    size = file.stat().st_size
    assert "overwrite" in refusal(CheckpointError, source, file, "gguf", "q8_0")
    assert file.stat().st_size == size
    convert(source, file, "gguf", "q8_0", overwrite=True)
    assert file.stat().st_size < size


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints"])
def test_a_folder_with_files_of_others_is_never_replaced(foreign: str, source: Path) -> None:
    new = convert(source, source.parent / "new")
    (new / foreign).mkdir() if foreign == "checkpoints" else (new / foreign).write_text("mine")
    assert foreign in refusal(CheckpointError, source, new, overwrite=True)
    assert (new / foreign).exists()


def test_the_source_is_never_replaced(source: Path) -> None:
    assert "source" in refusal(ConfigError, source, source, overwrite=True)
    assert "source" in refusal(ConfigError, source, source.parent, overwrite=True)
    link = source.parent / "link"
    link.symlink_to(source)
    assert "source" in refusal(ConfigError, source, link, overwrite=True)
    assert "model.safetensors" in entries(source)


def test_files_and_folders_do_not_replace_each_other(source: Path) -> None:
    (source.parent / "m.gguf").mkdir()
    message = refusal(CheckpointError, source, source.parent / "m.gguf", "gguf", overwrite=True)
    assert "is a folder" in message
    (source.parent / "new").write_text("mine")
    message = refusal(CheckpointError, source, source.parent / "new", overwrite=True)
    assert "is a file" in message
    assert (source.parent / "new").read_text() == "mine"


def test_a_place_that_does_not_exist_is_named(source: Path) -> None:
    message = refusal(CheckpointError, source, source.parent / "no" / "new")
    assert "does not exist" in message


def test_the_new_folder_has_the_usual_rights(source: Path) -> None:
    new = convert(source, source.parent / "new")
    usual = source.parent / "usual"
    usual.mkdir()
    assert new.stat().st_mode == usual.stat().st_mode


# Kills itself at the n-th change to the file system below the folder, and says when it got through.
KILLED = """
import os, signal, sys
from anymamba.runtime.convert.conversion import convert
source, destination, layout, count = sys.argv[1:]
left = int(count)
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def hook(event, arguments):
    global left
    if event == "open":
        writes = isinstance(arguments[1], str) and "w" in arguments[1]
        changes = writes and not isinstance(arguments[0], int)
    else:
        changes = event in CHANGES
    if changes and str(arguments[0]).startswith(os.path.dirname(destination)):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
convert(source, destination, layout, "f16", overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers", "gguf"])
def test_a_killed_conversion_leaves_no_half_of_one(layout: str, source: Path) -> None:
    if layout == "gguf":
        pytest.importorskip("gguf")
    place = source.parent / "place"
    place.mkdir()
    destination = place / ("model.gguf" if layout == "gguf" else "model")
    whole = contents(convert(source, source.parent / f"whole{destination.suffix}", layout, "f16"))
    for count in range(100):
        command = [sys.executable, "-c", KILLED, source, destination, layout, str(count)]
        done = subprocess.run(list(map(str, command)), timeout=120, check=False)
        if destination.exists():
            assert contents(destination) == whole
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert count >= 3  # it was killed while it wrote, and between writing and renaming
    assert destination.exists()
    hidden = [name for name in entries(place) if name != destination.name]
    assert all(name.startswith(f".{destination.name}.") for name in hidden)


def contents(path: Path) -> dict[str, bytes]:
    found = [path] if path.is_file() else list(path.iterdir())
    return {"" if path.is_file() else file.name: file.read_bytes() for file in found}
