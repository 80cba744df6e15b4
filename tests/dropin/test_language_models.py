"""The drop-in's language models against ours and Transformers', on disk and cut anywhere."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import anymamba
from anymamba.dropin.mamba_ssm import MambaLMHeadModel
from anymamba.dropin.mamba_ssm.models.config_mamba import MambaConfig
from anymamba.dropin.mamba_ssm.models.mixer_seq_simple import MixerModel, create_block
from anymamba.dropin.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from anymamba.errors import CheckpointError, ConfigError
from tests.support.models import unhidden
from tests.support.stepping import prompt_and_steps
from tests.support.tolerance import assert_layer

MAMBA2 = {"layer": "Mamba2", "d_state": 6, "headdim": 8, "chunk_size": 8}
ATTENTION = {"num_heads": 3, "causal": True, "rotary_emb_dim": 4, "d_conv": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Mamba": {},
    "Mamba-2": {"ssm_cfg": MAMBA2},
    "plain norms": {"rms_norm": False, "fused_add_norm": False, "residual_in_fp32": False},
    "unfused": {"fused_add_norm": False},
    "hybrid": {
        "n_layer": 3,
        "d_intermediate": 40,
        "ssm_cfg": MAMBA2,
        "attn_layer_idx": [1],
        "attn_cfg": ATTENTION,
    },
}


def small_config(**fields: Any) -> MambaConfig:
    sizes = {"d_model": 24, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 5}}
    return MambaConfig(**sizes | fields)


def small_model(dtype: torch.dtype | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    return unhidden(MambaLMHeadModel(small_config(**fields), dtype=dtype)).eval()


def words(b: int = 2, l: int = 9) -> Tensor:
    return torch.randint(0, 61, (b, l), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_the_same_model_in_ours(tmp_path: Path, tied: bool) -> None:
    model = small_model(tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    ours = anymamba.MambaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_layer(model(words()).logits, ours(words()).logits)


def renamed(model: MambaLMHeadModel) -> dict[str, Tensor]:
    return {
        name.replace("embedding.", "embeddings."): weight
        for name, weight in model.state_dict().items()
    }


def test_transformers_mamba_of_the_same_weights() -> None:
    model = small_model()
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=24, state_size=5, num_hidden_layers=2, layer_norm_epsilon=1e-5
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.load_state_dict(renamed(model))
    with torch.no_grad():
        assert_layer(model(words()).logits, theirs(words()).logits)


def test_transformers_mamba2_of_the_same_weights() -> None:
    model = small_model(ssm_cfg=MAMBA2 | {"ngroups": 2}, tie_embeddings=False)
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=24, state_size=6, head_dim=8, num_heads=6, n_groups=2,
        num_hidden_layers=2, chunk_size=8, expand=2, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.load_state_dict(renamed(model))
    with torch.no_grad():
        assert_layer(model(words()).logits, theirs(words()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_wherever_a_sequence_is_cut_its_logits_are_the_same(name: str, dtype: torch.dtype) -> None:
    model = small_model(dtype, **MODELS[name])
    with torch.no_grad():
        whole = model(words()).logits
        assert whole.dtype == dtype
        assert_layer(model(words(), num_last_tokens=2).logits, whole[:, -2:])
    for cut in (1, 2, 5, 8):
        logits = prompt_and_steps(lambda ids, **rest: model(ids, **rest).logits, words(), cut)
        assert_layer(logits, whole)


@pytest.mark.parametrize("name", MODELS)
def test_fused_norms_and_half_precision_change_little(name: str) -> None:
    fields = MODELS[name]
    with torch.no_grad():
        expected = small_model(**fields)(words()).logits
        other = fields | {"fused_add_norm": not fields.get("fused_add_norm", True)}
        assert_layer(small_model(**other)(words()).logits, expected)
        # Each layer rounds to 8 bits once more: the tolerance is that of one, times three.
        error = (small_model(**fields).bfloat16()(words()).logits - expected).abs().max()
        assert error <= 3 * 2e-2 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_a_gradient(name: str) -> None:
    """Against differences of the loss, in the direction of the gradient."""
    model = small_model(**MODELS[name])

    def loss() -> Tensor:
        logits = model(words()).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), words()[:, 1:].flatten()
        )

    loss().backward()
    for weight_name, weight in model.named_parameters():
        assert weight.grad is not None, weight_name
        size = float(weight.grad.norm())
        assert size > 0, weight_name
        step = 1e-3 / size
        with torch.no_grad():
            weight.add_(step * weight.grad)
            above = loss()
            weight.sub_(2 * step * weight.grad)
            below = loss()
            weight.add_(step * weight.grad)
        # Differences of float32 losses around 4 carry about 1e-6 of 2e-3 * size.
        expected = 2 * step * size**2
        assert abs(float(above - below) - expected) <= 0.03 * expected + 4e-6, weight_name


def test_names_of_weights() -> None:
    names = ["backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"]
    mamba = ["A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight"]
    mamba += ["dt_proj.weight", "dt_proj.bias", "out_proj.weight"]
    for layer in (0, 1):
        names.append(f"backbone.layers.{layer}.norm.weight")
        names += [f"backbone.layers.{layer}.mixer.{name}" for name in mamba]
    assert sorted(small_model().state_dict()) == sorted(names)
    hybrid = small_model(**MODELS["hybrid"]).state_dict()
    projections = {f"mixer.{name}" for name in ("in_proj", "conv1d", "out_proj")}
    expected = {f"{name}.weight" for name in ("norm", "norm2", "mlp.fc1", "mlp.fc2", *projections)}
    expected |= {f"{name}.bias" for name in projections}
    layer = "backbone.layers.1."
    assert {name for name in hybrid if name.startswith(layer)} == {layer + n for n in expected}
    assert "backbone.norm_f.bias" in small_model(rms_norm=False).state_dict()


def test_first_weights() -> None:
    torch.manual_seed(0)
    model = MambaLMHeadModel(small_config(d_model=64, n_layer=8), {"initializer_range": 0.5})
    embedding = model.backbone.embedding.weight
    assert embedding is model.lm_head.weight
    assert 0.45 < float(embedding.std()) < 0.55
    mixer = model.backbone.layers[0].mixer
    # Uniform within 1 / sqrt(fan in), then divided by the root of the number of layers.
    bound = 128**-0.5 / 8**0.5
    assert 0.9 * bound < float(mixer.out_proj.weight.abs().max()) <= bound
    assert mixer.dt_proj.bias.ne(0).all()
    backbone = MixerModel(64, 2, 0, 61, initializer_cfg={"rescale_prenorm_residual": False})
    largest = float(backbone.layers[0].mixer.out_proj.weight.abs().max())
    assert 0.9 * 128**-0.5 < largest <= 128**-0.5
    assert small_model(vocab_size=61, pad_vocab_size_multiple=10).lm_head.weight.shape == (70, 24)


def test_blocks() -> None:
    block = create_block(24, 0, {"d_state": 5}, attn_layer_idx=[1], layer_idx=0)
    assert block.layer_idx == block.mixer.layer_idx == 0
    assert type(block.norm) is torch.nn.LayerNorm
    assert block.mlp is None
    attention = create_block(24, 8, None, [1], ATTENTION, rms_norm=True, layer_idx=1)
    assert type(attention.mixer).__name__ == "MHA"
    assert attention.mlp.fc2.in_features == 128
    with pytest.raises(ConfigError, match="'Mamba3', expected 'Mamba1' or 'Mamba2'"):
        create_block(24, 0, {"layer": "Mamba3"})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("safe", [True, False])
def test_a_model_survives_its_files(name: str, safe: bool, tmp_path: Path) -> None:
    model = small_model(**MODELS[name])
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert stored.keys() == model.state_dict().keys()
    if safe:
        del stored["lm_head.weight"]  # safetensors keeps a shared table once
        save_file(stored, folder / "model.safetensors")
        (folder / "pytorch_model.bin").unlink()
    assert load_config_hf(str(folder)) == vars(model.config)
    loaded = MambaLMHeadModel.from_pretrained(str(folder))
    assert loaded.config == model.config
    assert loaded.training
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
    with torch.no_grad():
        assert torch.equal(loaded(words()).logits, model(words()).logits)
    half = MambaLMHeadModel.from_pretrained(str(folder), device="cpu", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_a_state_dict_of_another_type(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    assert {t.dtype for t in load_state_dict_hf(tmp_path).values()} == {torch.float32}
    halves = load_state_dict_hf(tmp_path, device="cpu", dtype=torch.float16)
    assert {t.dtype for t in halves.values()} == {torch.float16}


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was_run"),))


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vars(small_config())))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    assert not (tmp_path / "was_run").exists()


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        MambaLMHeadModel.from_pretrained(str(tmp_path / "none"))
    small_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(vars(small_config(n_layer=3))))
    with pytest.raises(CheckpointError, match=r"do not fit its config(.|\n)*layers\.2\.mixer\.D"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    config.write_text(json.dumps({"model_type": "mamba", "hidden_size": 24}))
    with pytest.raises(CheckpointError, match="Transformers' layout"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    config.write_text(json.dumps({"d_model": 24, "n_head": 3}))
    with pytest.raises(CheckpointError, match="'n_head', which no model"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        small_model().save_pretrained(tmp_path / "file")
