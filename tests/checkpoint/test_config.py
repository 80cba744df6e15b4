"""config.json in three layouts, and broken."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.checkpoint import expected_shapes, read_config
from anymamba.errors import CheckpointError
from tests.support import files
from tests.support.files import one_line
from tests.support.layouts import (
    CONFIGS,
    MINIMAL_CONFIG,
    ORIGINAL_CONFIG,
    TRANSFORMERS_CONFIG,
    write_config,
)

MAMBA2 = {"layer": "Mamba2", "headdim": 4}


def refusal(folder) -> str:
    message = files.refusal(CheckpointError, read_config, folder)
    assert "config.json" in message
    return message


@pytest.mark.parametrize("layout", CONFIGS)
def test_each_layout_describes_the_same_model(tmp_path, layout):
    found, config = read_config(write_config(tmp_path, CONFIGS[layout]))
    assert found == layout
    assert config["model_type"] == "mamba"
    assert expected_shapes(config) == expected_shapes(TRANSFORMERS_CONFIG)


def test_every_field_of_the_original_layout(tmp_path):
    fields = ORIGINAL_CONFIG | {
        "residual_in_fp32": False,
        "tie_embeddings": False,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "d_intermediate": 0,
        "ssm_cfg": {
            "layer": "Mamba1",
            "d_state": 8,
            "d_conv": 2,
            "expand": 3,
            "dt_rank": "auto",
            "dt_min": 0.002,
            "dt_max": 0.2,
            "dt_init": "constant",
            "dt_scale": 2.0,
            "dt_init_floor": 1e-3,
            "conv_bias": False,
            "bias": True,
            "use_fast_path": True,
        },
    }
    assert read_config(write_config(tmp_path, fields))[1] == {
        "model_type": "mamba",
        "hidden_size": 6,
        "num_hidden_layers": 2,
        "vocab_size": 16,
        "residual_in_fp32": False,
        "tie_word_embeddings": False,
        "state_size": 8,
        "conv_kernel": 2,
        "expand": 3,
        "time_step_rank": "auto",
        "time_step_min": 0.002,
        "time_step_max": 0.2,
        "time_step_init_scheme": "constant",
        "time_step_scale": 2.0,
        "time_step_floor": 1e-3,
        "use_conv_bias": False,
        "use_bias": True,
    }


def test_the_published_original_config(tmp_path):
    """What state-spaces/mamba-130m says, and the padded vocabulary its weights have."""
    fields = {
        "d_model": 768,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    layout, config = read_config(write_config(tmp_path, fields))
    shapes = expected_shapes(config)
    assert layout == "original"
    assert shapes["backbone.embeddings.weight"] == (50280, 768)
    assert shapes["backbone.layers.23.mixer.x_proj.weight"] == (80, 1536)


def test_the_original_layout_of_mamba2(tmp_path):
    """What state-spaces/mamba2-130m says, and the sizes of its tensors."""
    fields = {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    layout, config = read_config(write_config(tmp_path, fields))
    shapes = expected_shapes(config)
    assert (layout, config["num_heads"], config["n_groups"]) == ("original", 24, 1)
    assert shapes["backbone.embeddings.weight"] == (50288, 768)
    assert shapes["backbone.layers.23.mixer.in_proj.weight"] == (3352, 768)
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == (1792, 1, 4)
    assert shapes["backbone.layers.0.mixer.A_log"] == (24,)
    assert "lm_head.weight" not in shapes


@pytest.mark.parametrize("multiple", [1, 7, 8, 16])
def test_padding(tmp_path, multiple):
    fields = MINIMAL_CONFIG | {"vocab_size": 13, "pad_vocab_size_multiple": multiple}
    size = read_config(write_config(tmp_path, fields))[1]["vocab_size"]
    assert size % multiple == 0
    assert 13 <= size < 13 + multiple


def test_transformers_fields_are_kept(tmp_path):
    fields = TRANSFORMERS_CONFIG | {"eos_token_id": 3, "something_new": [1]}
    assert read_config(write_config(tmp_path, fields)) == ("transformers", fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": "bamba"}, "'bamba'"),
        ({"model_type": ["mamba"]}, "['mamba']"),
        ({}, "d_model, n_layer, vocab_size"),
        ({"d_model": 4}, "n_layer, vocab_size"),
        (ORIGINAL_CONFIG | {"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3'"),
        (ORIGINAL_CONFIG | {"ssm_cfg": {"layer": "Mamba2"}}, "headdim is 64"),
        (ORIGINAL_CONFIG | {"ssm_cfg": MAMBA2 | {"ngroups": 5}}, "n_groups 5"),
        (ORIGINAL_CONFIG | {"ssm_cfg": MAMBA2 | {"norm_before_gate": 1}}, "gate_after_norm"),
        (ORIGINAL_CONFIG | {"ssm_cfg": MAMBA2 | {"D_has_hdim": True}}, "D_has_hdim is True"),
        (ORIGINAL_CONFIG | {"ssm_cfg": MAMBA2 | {"dt_rank": 4}}, "'dt_rank'"),
        ({"model_type": "mamba2", "num_heads": 3}, "num_heads 3 times head_dim 64"),
        ({"model_type": "mamba2", "n_groups": 0}, "n_groups"),
        (ORIGINAL_CONFIG | {"ssm_cfg": {"headdim": 64}}, "'headdim'"),
        (ORIGINAL_CONFIG | {"ssm_cfg": [1]}, "ssm_cfg"),
        (ORIGINAL_CONFIG | {"attn_layer_idx": [3]}, "attn_layer_idx is [3]"),
        (ORIGINAL_CONFIG | {"d_intermediate": 64}, "d_intermediate is 64"),
        (ORIGINAL_CONFIG | {"rms_norm": False}, "rms_norm is False"),
        (ORIGINAL_CONFIG | {"d_model": -1}, "hidden_size"),
        (ORIGINAL_CONFIG | {"vocab_size": "13"}, "vocab_size"),
        (ORIGINAL_CONFIG | {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        (MINIMAL_CONFIG | {"dt_rank": 0}, "time_step_rank"),
        (MINIMAL_CONFIG | {"n_layer": 10**12}, "num_hidden_layers"),
        (TRANSFORMERS_CONFIG | {"hidden_size": "large"}, "'large'"),
    ],
)
def test_refused_by_name(tmp_path, fields, said):
    assert said in refusal(write_config(tmp_path, fields))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"d_model": 1, "d_model": 2}', "'d_model' stands twice"),
        (b"\x80", "not UTF-8"),
        (b"[" * 100_000, "deeply"),
        (b" " * (9 << 20), "larger than"),
    ],
)
def test_broken_json(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text)
    assert said in refusal(tmp_path)


def test_missing(tmp_path):
    assert "missing" in refusal(tmp_path)


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.sampled_from(["layer", "d_state", "x"]), st.integers(), max_size=2)
)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(sorted(CONFIGS)))
def test_any_values(tmp_path_factory, data, layout):
    fields = dict(CONFIGS[layout])
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
        fields[name] = data.draw(ANYTHING)
    folder = tmp_path_factory.mktemp("any")
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        _, config = read_config(folder)
    except CheckpointError as error:
        one_line(error)
    else:
        assert all(size > 0 for shape in expected_shapes(config).values() for size in shape)
