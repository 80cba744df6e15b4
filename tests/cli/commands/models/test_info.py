"""`anymamba info`: what it says about models and machines, and that it needs no torch."""

import json
import platform
import shutil
import sys

import pytest
import torch

from anymamba import MambaCache, MambaConfig, MambaForCausalLM, __version__
from anymamba.assets import bundled_model
from anymamba.cli.describe import machine as about_machine
from anymamba.cli.terminal.sizes import size
from anymamba.errors import CheckpointError
from anymamba.ops import available_backends
from tests.support import processes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_loaded_model(tied, dtype, tmp_path, anymamba):
    config = MambaConfig(
        vocab_size=40,
        hidden_size=24,
        state_size=5,
        num_hidden_layers=3,
        conv_kernel=3,
        tie_word_embeddings=tied,
    )
    model = MambaForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path)
    facts = anymamba("info", tmp_path, "--json").json
    assert facts["parameters"] == model.num_parameters()
    cache = MambaCache(config, 1, dtype=dtype)
    assert facts["state_bytes"] == {
        "conv_states": cache.conv_states.nbytes,
        "ssm_states": cache.ssm_states.nbytes,
        "total": cache.conv_states.nbytes + cache.ssm_states.nbytes,
    }
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert facts["dtypes"] == {name: model.num_parameters()}
    assert facts["layout"] == "transformers"
    assert facts["architecture"]["hidden_size"] == 24
    assert facts["architecture"]["intermediate_size"] == 48
    assert facts["architecture"]["tie_word_embeddings"] is tied
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert {file["name"]: file["bytes"] for file in facts["files"]} == sizes


def test_a_model_in_words(anymamba):
    done = anymamba("info", bundled_model())
    assert (done.status, done.err) == (0, "")
    lines = {line.split("  ")[0]: line for line in done.out.splitlines()}
    facts = anymamba("info", bundled_model(), "--json").json
    assert f"{facts['parameters']:,}" in lines["parameters"]
    assert size(facts["state_bytes"]["total"]) in lines["state"]
    for file in facts["files"]:
        assert f"  {file['name']}" in done.out


def test_the_original_layout_and_pickles(tiny, tmp_path, anymamba):
    model = MambaForCausalLM.from_pretrained(tiny)
    sizes = {"d_model": 16, "n_layer": 1, "vocab_size": 256, "ssm_cfg": {}}
    sizes["tie_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    names = {"backbone.embeddings.weight": "backbone.embedding.weight"}
    weights = {names.get(name, name): weight for name, weight in model.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    facts = anymamba("info", tmp_path, "--json").json
    assert facts["layout"] == "original"
    assert facts["parameters"] == model.num_parameters()
    assert facts["dtypes"] == {}
    assert "pickle" in anymamba("info", tmp_path).out


@pytest.mark.parametrize("model", ["./nowhere", "nobody/nothing", ""])
def test_a_model_that_is_not_there(model, anymamba):
    assert repr(model) in anymamba("info", model).complaint


def test_files_that_do_not_fit_together(tiny, tmp_path, anymamba):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "backbone.layers.1" in anymamba("info", tmp_path).complaint


def test_the_machine(anymamba):
    facts = anymamba("info", "--json").json
    assert facts["anymamba"] == __version__
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["bundled_model"] == str(bundled_model())
    backends = [tuple(backend.values()) for backend in facts["backends"]]
    assert backends == available_backends()
    text = anymamba("info").out
    for name, available, reason in backends:
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert line.endswith(reason)
        assert line.split()[1] == ("yes" if available else "no")


def test_a_missing_bundled_model_is_said(monkeypatch, anymamba):
    def missing():
        raise CheckpointError("gone")

    monkeypatch.setattr("anymamba.assets.bundled_model", missing)
    assert anymamba("info", "--json").json["bundled_model"] == "not available: gone"


def run_without_torch(*arguments):
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from anymamba.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "slow = {'transformers', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else status)\n"
    )
    return processes.python("-c", program, *arguments)


def test_models_are_described_without_torch(tiny):
    done = run_without_torch("info", tiny, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["parameters"] > 0


def test_a_machine_without_torch_is_told_what_to_install():
    done = run_without_torch("info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert "pip install 'anymamba[torch]'" in facts["torch"]
    assert facts["backends"] == []


def test_a_broken_torch_is_not_called_missing(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise ImportError("a library is missing")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert about_machine.torch_and_backends() == ("broken: a library is missing", [])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_340_000, "12.3 MB")],
)
def test_sizes_are_readable(count, text):
    assert size(count) == text


def test_a_state(tiny, tmp_path, anymamba):
    state = tmp_path / "a.state"
    (tmp_path / "a.txt").write_text("To be")
    options = ("--save-state", state, "--model", tiny)
    assert anymamba("ingest", tmp_path / "a.txt", *options).status == 0
    facts = anymamba("info", state, "--json").json
    assert facts["token_counts"] == [5]
    assert facts["model"]["hidden_size"] == 16
    assert facts["bytes"] == state.stat().st_size
    assert len(facts["weights_digest"]) == 64
    text = anymamba("info", state).out
    assert facts["weights_digest"] in text
    assert "hidden_size" in text


@pytest.mark.parametrize("content", [b"", b"words", b"\x10" + bytes(7) + b'{"a":' + b"1" * 11])
def test_a_file_that_is_neither_model_nor_state(content, tmp_path, anymamba):
    (tmp_path / "file").write_bytes(content)
    assert str(tmp_path / "file") in anymamba("info", tmp_path / "file").complaint


def test_weights_that_are_no_state(tiny, anymamba):
    assert "not a state" in anymamba("info", tiny / "model.safetensors").complaint


def test_another_program_s_quantization_is_named(tiny, tmp_path, anymamba):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "gptq" in anymamba("info", tmp_path).complaint


@pytest.mark.parametrize("name", ["nofile", "no/file", "./nofile", "nofile.gguf", "no file"])
def test_what_is_not_here_is_said_first(name, anymamba):
    complaint = anymamba("info", name, "--offline").complaint
    assert "does not exist" in complaint or f"there is no file or folder {name!r}" in complaint
