"""Sharded checkpoints: from one number of processes to another, and to a normal folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaForCausalLM as TransformersMamba

from anymamba import MambaForCausalLM
from anymamba.errors import CheckpointError
from anymamba.training.distributed import checkpoints, export_sharded, load_sharded, save_sharded
from tests.training.distributed import work
from tests.training.distributed.launching import launch
from tests.training.distributed.test_data_parallel import LOSSES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_from_two_processes_to_one(kind: str, alone: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    for found in launch(work.train_and_save, 2, tmp_path / "run", kind, folder):
        assert found == pytest.approx(alone[0][:2], abs=LOSSES)
    assert work.load_and_train("alone", folder) == pytest.approx(alone[0][2:], abs=LOSSES)
    if kind == "fsdp":
        assert len(list(folder.glob("*.distcp"))) == 2


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_from_one_process_to_two(kind: str, alone: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    work.train_and_save("alone", folder)
    for found in launch(work.load_and_train, 2, tmp_path / "run", kind, folder):
        assert found == pytest.approx(alone[0][2:], abs=LOSSES)


def test_from_two_processes_to_three_and_to_a_normal_folder(alone: Any, tmp_path: Path) -> None:
    folder, output = tmp_path / "checkpoint", tmp_path / "model"
    launch(work.train_and_save, 2, tmp_path / "two", "fsdp", folder)
    model, optimizer = work.prepared("alone")
    work.train(model, optimizer, stop=2)

    export_sharded(folder, output)
    for kind in (MambaForCausalLM, TransformersMamba):
        loaded = kind.from_pretrained(output).eval()
        with torch.no_grad():
            found = loaded(work.batch(0)).logits
            expected = model.eval()(work.batch(0)).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert '"MambaForCausalLM"' in (output / "config.json").read_text(encoding="utf-8")
    three = launch(work.weights_of, 3, tmp_path / "three", folder)
    for weights in three:
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weights[name], weight.detach(), rtol=0, atol=1e-4)


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    for message in launch(work.save_twice, 2, tmp_path / "run", tmp_path / "checkpoint"):
        assert "exists already" in message


def test_what_was_interrupted_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = work.small_model(), tmp_path / "checkpoint"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save_sharded(folder, model)
    assert not folder.exists()
    with pytest.raises(CheckpointError, match="no checkpoint that save_sharded wrote"):
        load_sharded(folder, model)
    save_sharded(folder, model)
    assert load_sharded(folder, model) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path / "checkpoint", work.small_model())
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_sharded(tmp_path / "checkpoint", work.small_model(conv_kernel=3))
