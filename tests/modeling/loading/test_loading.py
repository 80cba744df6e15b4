"""`from_pretrained` and `save_pretrained` across layouts; tests/checkpoint has the broken files."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from anymamba import MambaForCausalLM, MambaModel
from anymamba.errors import CheckpointError, HubError
from tests.support.files import refusal
from tests.support.models import small_model, words
from tests.support.tolerance import assert_same

IDS = words(2, 9)


def write_original(folder: Path, model: MambaForCausalLM) -> None:
    """As state-spaces/mamba-* are stored: their config, their names, a pickle."""
    folder.mkdir(exist_ok=True)
    config = {
        "d_model": 24,
        "n_layer": 2,
        "vocab_size": 61,
        "ssm_cfg": {"d_state": 5},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name.replace("embeddings.", "embedding."): weight
        for name, weight in model.state_dict().items()
    }
    torch.save(weights, folder / "pytorch_model.bin")


def write_minimal(folder: Path, model: MambaForCausalLM) -> None:
    """As `anymamba.minimal` would store its state dict."""
    folder.mkdir(exist_ok=True)
    sizes = {"d_model": 24, "n_layer": 2, "vocab_size": 61, "d_state": 5}
    (folder / "config.json").write_text(json.dumps(sizes | {"pad_vocab_size_multiple": 1}))
    weights = {
        name.removeprefix("backbone.").replace("embeddings.", "embedding."): weight.clone()
        for name, weight in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("write", [write_original, write_minimal])
def test_other_layouts_load(tmp_path: Path, write: object) -> None:
    model = small_model()
    write(tmp_path, model)  # type: ignore[operator]
    loaded = MambaForCausalLM.from_pretrained(tmp_path)
    assert not loaded.training
    assert_same(loaded(IDS).logits, model(IDS).logits)
    assert_same(
        MambaModel.from_pretrained(tmp_path)(IDS).last_hidden_state,
        model.backbone(IDS).last_hidden_state,
    )
    assert MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.MambaForCausalLM.from_pretrained(tmp_path / "again")
    assert_same(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "use_bias": True}])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_transformers_reads_what_we_write_and_the_reverse(
    tmp_path: Path, fields: dict[str, bool], shard: str
) -> None:
    model = small_model(**fields)
    model.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same(theirs(IDS).logits, model(IDS).logits)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    loaded = MambaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert_same(loaded(IDS).logits, model(IDS).logits)
    assert_same(
        MambaModel.from_pretrained(tmp_path / "theirs")(IDS).last_hidden_state,
        model.backbone(IDS).last_hidden_state,
    )


def test_a_backbone_alone_becomes_a_language_model(tmp_path: Path) -> None:
    model = small_model()
    model.backbone.save_pretrained(tmp_path)
    assert_same(MambaForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_config_fields_can_be_overridden(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path, use_cache=False)
    assert loaded.config.use_cache is False
    given = MambaForCausalLM.from_pretrained(tmp_path, config=loaded.config)
    assert given.config.use_cache is False


def test_all_defects_are_in_one_message(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["backbone.norm_f.weight"]
    weights["surplus"] = torch.ones(1)
    weights["backbone.layers.1.mixer.D"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    message = refusal(CheckpointError, MambaForCausalLM.from_pretrained, tmp_path)
    for part in ("missing backbone.norm_f.weight", "surplus", "layers.1.mixer.D is 3"):
        assert part in message


def test_no_network_tells_how_to_give_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="folder"):
        MambaForCausalLM.from_pretrained("state-spaces/mamba-130m-hf", cache_dir=tmp_path)


def test_a_generation_config_is_read(tmp_path: Path) -> None:
    model = small_model()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    assert MambaForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.5
