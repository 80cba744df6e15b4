"""Known checkpoints, their sizes, and downloading one from a stand-in for the hub."""

from pathlib import Path
from typing import Any

import pytest

import anymamba as package
from anymamba.checkpoint import expected_shapes
from anymamba.cli.describe.known_models import KNOWN_MODELS, KnownModel
from anymamba.cli.main import build_parser
from tests.support.cli import Command
from tests.support.hub import Hub
from tests.support.layouts import write_model


def config_of(model: KnownModel) -> dict[str, Any]:
    return {
        "model_type": "mamba",
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("state-spaces/mamba-130m-hf", 129_135_360),
        ("state-spaces/mamba-370m-hf", 371_516_416),
        ("state-spaces/mamba-790m-hf", 793_204_224),
        ("state-spaces/mamba-1.4b-hf", 1_372_178_432),
        ("state-spaces/mamba-2.8b-hf", 2_768_345_600),
        ("tiiuae/falcon-mamba-7b", 7_272_665_088),
        ("mistralai/Mamba-Codestral-7B-v0.1", 7_285_403_648),
    ],
)
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    found = {model.name: model.parameters for model in KNOWN_MODELS}
    assert found[name] == parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_memory_is_what_an_engine_takes(weights: str, tied: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    small = KnownModel("a/b", "base", "", width=128, layers=2, tied=tied, vocabulary=40)
    shapes = expected_shapes(config_of(small))
    tensors = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    write_model(tmp_path, tensors=tensors, **config_of(small), state_size=16, time_step_rank=8)
    engine = package.load(tmp_path, weights=weights, threads=1)
    assert small.weight_bytes(weights) == engine.weight_bytes


def test_the_list_names_each_model_once_with_a_command(anymamba: Command) -> None:
    shown = anymamba("models").out
    listed = anymamba("models", "--json").json["models"]
    assert [model["model"] for model in listed] == [model.name for model in KNOWN_MODELS]
    for model in listed:
        assert model["command"] in shown
        assert model["licence"]
        assert model["run_here"] is False
        for command in model["command"].split(" && "):
            words = command.replace('"Mamba is"', "prompt").split()[1:]
            assert build_parser(words[:1]).parse_args(words).command == words[0]
    assert "none was run" in shown


def test_a_download_is_found_by_name_afterwards(
    hub: Hub, tmp_path: Path, anymamba: Command
) -> None:
    hub.folders["someone/mamba-tiny"] = write_model(tmp_path / "served")
    done = anymamba("download", "someone/mamba-tiny")
    assert done.status == 0, done.err
    folder = Path(done.out.rpartition(":")[0])
    assert {"config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}
    assert "anymamba generate" in done.err
    hub.broken = True
    facts = anymamba("download", "someone/mamba-tiny", "--offline", "--json").json
    assert facts["folder"] == str(folder)
    assert not facts["pickled"]
    assert anymamba("info", "someone/mamba-tiny", "--offline").status == 0


def test_a_pickled_download_says_what_to_do(hub: Hub, tmp_path: Path, anymamba: Command) -> None:
    hub.folders["someone/old"] = write_model(tmp_path / "served", "original", pickled=True)
    done = anymamba("download", "someone/old")
    assert "anymamba convert someone/old ./old" in done.err


@pytest.mark.parametrize("defect", ["absent", "broken", "no weights"])
def test_what_cannot_be_had_is_told_in_a_line(
    defect: str, hub: Hub, tmp_path: Path, anymamba: Command
) -> None:
    if defect != "absent":
        hub.folders["someone/mamba"] = write_model(tmp_path / "served")
    hub.broken = defect == "broken"
    if defect == "no weights":
        (tmp_path / "served" / "model.safetensors").unlink()
    done = anymamba("download", "someone/mamba", "--json")
    assert (done.status, done.out) == (2, "")
    assert "someone/mamba" in done.err or "safetensors" in done.err
    assert "Traceback" not in done.err
