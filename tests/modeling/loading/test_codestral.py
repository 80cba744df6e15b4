"""Codestral-Mamba's checkpoint, small: Mistral's own form, and Transformers' beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import anymamba
from anymamba.checkpoint import read_config
from anymamba.checkpoint.gguf.reader import read_gguf
from anymamba.errors import CheckpointError
from anymamba.modeling.auto import load_causal_lm
from anymamba.runtime.convert import convert
from tests.support.files import one_line, refusal
from tests.support.tolerance import assert_same

PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "vocab_size": 96,
    "n_groups": 2,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
    "model_type": "mamba",
}
# The fields of the hub's config.json, in which Transformers of that time wrote infinity plainly.
CONFIG = """{
  "architectures": ["Mamba2ForCausalLM"],
  "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
  "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64, "hidden_act": "silu",
  "hidden_size": 64, "initializer_range": 0.1, "intermediate_size": 128,
  "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 2, "norm_before_gate": true,
  "num_heads": 2, "num_hidden_layers": 2, "rescale_prenorm_residual": false,
  "residual_in_fp32": true, "rms_norm": true, "state_size": 128, "tie_word_embeddings": false,
  "time_step_floor": 0.0001, "time_step_init_scheme": "random",
  "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.001,
  "time_step_rank": 4, "time_step_scale": 1.0, "torch_dtype": "float32", "use_bias": false,
  "use_cache": true, "use_conv_bias": true, "vocab_size": 96
}"""
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    fields = {k: v for k, v in json.loads(CONFIG).items() if k != "norm_before_gate"}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write_mistral(folder: Path, model: Any, **changes: Any) -> Path:
    """params.json and consolidated.safetensors: the authors' model inside of Mistral's."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))
    named = {name.replace("embeddings.", "embedding."): t for name, t in model.state_dict().items()}
    stored = {f"model.{name}": tensor.clone() for name, tensor in named.items()}
    save_file(stored, folder / "consolidated.safetensors")
    return folder


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(IDS).logits
    return logits


def test_mistral_s_form(theirs: Any, tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "model", theirs)
    model = load_causal_lm(folder)
    assert isinstance(model, anymamba.Mamba2ForCausalLM)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert_same(logits_of(model), logits_of(theirs))
    config = anymamba.Mamba2Config.from_pretrained(folder)
    assert (config.num_heads, config.n_groups, config.hidden_size) == (2, 2, 64)


def test_transformers_form_beside_it(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    write_mistral(tmp_path / "model", theirs, dim=32)  # not what is read
    (tmp_path / "model" / "config.json").write_text(CONFIG)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert_same(logits_of(load_causal_lm(tmp_path / "model")), logits_of(theirs))


def test_mistral_s_form_becomes_the_others(theirs: Any, tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "model", theirs)
    copy = convert(folder, tmp_path / "copy")
    file = convert(folder, tmp_path / "model.gguf", "gguf")
    assert read_gguf(file).config["eos_token_id"] == 2
    for place in (copy, file):
        assert_same(logits_of(load_causal_lm(place)), logits_of(theirs))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "transformer"}, "'transformer'"),
        ({"head_dim": 64}, "'head_dim'"),
        ({"n_groups": 3}, "n_groups 3"),
        ({"n_groups": "2"}, "n_groups"),
        ({"dim": 64.0}, "64.0"),
        ({"rms_norm": False}, "rms_norm"),
    ],
)
def test_other_params_are_named(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | changes))
    message = refusal(CheckpointError, read_config, tmp_path)
    assert "params.json" in message
    assert word in message


def test_missing_params_are_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({"dim": 64}))
    with pytest.raises(CheckpointError, match="lacks n_layers, n_groups, vocab_size") as caught:
        read_config(tmp_path)
    one_line(caught.value)
