"""`MambaConfig`: what it takes, what it refuses, and that Transformers reads the same from it."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from anymamba.errors import ConfigError
from anymamba.modeling.config import MambaConfig

TransformersConfig = transformers.models.mamba.MambaConfig

# The defaults that the documentation of both libraries states, typed out rather than read off.
DEFAULTS = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "residual_in_fp32": True,
    "time_step_rank": 48,
    "time_step_scale": 1.0,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_init_scheme": "random",
    "time_step_floor": 1e-4,
    "rescale_prenorm_residual": False,
    "use_cache": True,
    "use_mambapy": False,
    "use_associative_scan": True,
    "tie_word_embeddings": True,
    "intermediate_size": 1536,
}

# Each field with each other value than its default that makes sense, and is not the default.
OTHER_VALUES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "state_size": 8,
    "num_hidden_layers": 3,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 2],
    "expand": 3,
    "conv_kernel": 2,
    "use_bias": True,
    "use_conv_bias": False,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "residual_in_fp32": False,
    "time_step_rank": 5,
    "time_step_scale": 0.5,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_init_scheme": "uniform",
    "time_step_floor": 1e-5,
    "rescale_prenorm_residual": True,
    "use_cache": False,
    "use_mambapy": True,
    "use_associative_scan": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "unknown_field": {"kept": [1, 2]},
}

SIZES = ["vocab_size", "hidden_size", "state_size", "num_hidden_layers", "conv_kernel"]
SWITCHES = [name for name, value in DEFAULTS.items() if isinstance(value, bool)]
POSITIVE = ["time_step_scale", "time_step_min", "time_step_max", "expand"]
NOT_NEGATIVE = ["layer_norm_epsilon", "initializer_range", "time_step_floor"]
NO_NUMBER = [math.nan, math.inf, True, "1", None, [1.0]]

REFUSED = [
    *[(name, value) for name in SIZES for value in (0, -1, 1.5, 2.0, True, "64", None, [64])],
    *[(name, value) for name in SWITCHES for value in (0, 1, "true", None)],
    *[(name, value) for name in POSITIVE for value in (0, -0.5, *NO_NUMBER)],
    *[(name, value) for name in NOT_NEGATIVE for value in (-1e-9, *NO_NUMBER)],
    *[("time_step_rank", value) for value in (0, -1, 1.5, True, "full", None)],
    *[(f"{name}_token_id", value) for name in ("pad", "bos", "eos") for value in (-1, 1.0, "a")],
    *[("pad_token_id", value) for value in ([0], True)],
    *[("eos_token_id", value) for value in ([], [0, -1], [True], ["a"])],
    *[("hidden_act", value) for value in ("sillu", None, 3, ["silu"])],
    *[("time_step_init_scheme", value) for value in ("normal", None, 3)],
    ("expand", 1.3),
    ("intermediate_size", 100),
    ("dtype", "float33"),
    ("dtype", 16),
    ("torch_dtype", "float33"),
    ("return_dict", "yes"),
    ("output_hidden_states", 1),
    ("layer_types", ["linear_attention"]),
    ("layer_types", ["full_attention"] * 32),
    ("layer_types", "mamba"),
]


def test_the_defaults_are_the_documented_ones() -> None:
    written = MambaConfig().to_dict()
    assert {name: written[name] for name in DEFAULTS} == DEFAULTS
    assert MambaConfig().model_type == "mamba"


def test_the_defaults_are_those_of_transformers() -> None:
    theirs, ours = TransformersConfig().to_dict(), MambaConfig().to_dict()
    assert ours == theirs


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=repr)
def test_a_value_that_makes_no_sense_is_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as raised:
        MambaConfig(**{name: value})
    message = str(raised.value)
    assert "\n" not in message
    assert (name.removeprefix("torch_")) in message
    assert repr(value)[:10] in message
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=repr)
def test_a_later_assignment_is_checked_too_and_changes_nothing(name: str, value: object) -> None:
    name = name.removeprefix("torch_")  # an old name that only construction knows
    config = MambaConfig()
    before = getattr(config, name)
    with pytest.raises(ConfigError, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == before


def test_a_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "mamba", "state_size": 0}))
    with pytest.raises(ConfigError, match=r"state_size must be an integer >= 1, got 0"):
        MambaConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"conv_kernel must be an integer >= 1, got -4"):
        MambaConfig.from_dict({"conv_kernel": -4})
    file.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ConfigError, match=r"hidden_size must be an integer >= 1, got -8"):
        MambaConfig.from_pretrained(tmp_path, hidden_size=-8)


TOGETHER_REFUSED = [
    {"time_step_min": 0.5, "time_step_max": 0.4},
    {"time_step_floor": 0.01, "time_step_max": 0.005, "time_step_min": 0.001},
    {"expand": 1.5, "hidden_size": 33},
    {"expand": 0.01, "hidden_size": 16},
]


def _assign(config: MambaConfig, settings: dict[str, float]) -> None:
    for name, value in settings.items():
        setattr(config, name, value)


@pytest.mark.parametrize("settings", TOGETHER_REFUSED, ids=str)
def test_values_that_do_not_go_together_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        MambaConfig(**settings)
    with pytest.raises(ConfigError):
        _assign(MambaConfig(), settings)


def test_both_ends_of_the_step_range_may_be_overridden_together() -> None:
    written = MambaConfig().to_dict()
    config = MambaConfig.from_dict(written, time_step_min=0.5, time_step_max=0.7)
    assert (config.time_step_min, config.time_step_max) == (0.5, 0.7)


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items(), ids=str)
def test_each_field_goes_to_transformers_and_back(tmp_path: Path, name: str, value: object) -> None:
    ours = MambaConfig(**{name: value})
    ours.save_pretrained(tmp_path)
    theirs = TransformersConfig.from_pretrained(tmp_path)
    expected = torch.bfloat16 if name == "dtype" else value
    assert getattr(theirs, name) == expected
    theirs.save_pretrained(tmp_path)
    back = MambaConfig.from_pretrained(tmp_path)
    assert getattr(back, name) == expected
    assert back == ours


def test_all_fields_together_go_to_transformers_and_back(tmp_path: Path) -> None:
    theirs = TransformersConfig(**OTHER_VALUES)
    theirs.save_pretrained(tmp_path)
    ours = MambaConfig.from_pretrained(tmp_path)
    mine, reference = ours.to_dict(), theirs.to_dict()
    for written in (mine, reference):
        written.pop("_name_or_path")
    assert mine == reference
    ours.save_pretrained(tmp_path)
    assert TransformersConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == (
        theirs.to_dict() | {"_name_or_path": ""}
    )


def test_a_file_of_the_hub_loads() -> None:
    # The fields of a published mamba-130m configuration, values shrunk.
    config = MambaConfig.from_dict(
        {
            "architectures": ["MambaForCausalLM"],
            "bos_token_id": 0,
            "conv_kernel": 4,
            "d_inner": 1536,
            "d_model": 768,
            "eos_token_id": 0,
            "expand": 2,
            "fused_add_norm": True,
            "hidden_size": 768,
            "initializer_range": 0.1,
            "intermediate_size": 1536,
            "model_type": "mamba",
            "n_layer": 24,
            "num_hidden_layers": 24,
            "pad_vocab_size_multiple": 8,
            "ssm_cfg": {},
            "time_step_rank": 48,
            "torch_dtype": "float32",
            "transformers_version": "4.39.0.dev0",
        }
    )
    assert (config.d_inner, config.ssm_cfg, config.dtype) == (1536, {}, torch.float32)


@given(
    hidden_size=st.integers(1, 4096),
    expand=st.integers(1, 4),
    layers=st.integers(1, 8),
    state_size=st.integers(1, 64),
)
def test_derived_sizes_follow_whatever_is_set(
    hidden_size: int, expand: int, layers: int, state_size: int
) -> None:
    sizes = {
        "hidden_size": hidden_size,
        "expand": expand,
        "num_hidden_layers": layers,
        "state_size": state_size,
    }
    theirs = TransformersConfig(**sizes)
    for ours in (MambaConfig(**sizes), MambaConfig.from_dict(theirs.to_dict())):
        assert ours.intermediate_size == theirs.intermediate_size
        assert ours.time_step_rank == theirs.time_step_rank
        assert ours.layer_types == theirs.layer_types
    changed = MambaConfig()
    changed.hidden_size = hidden_size
    changed.expand = expand
    assert changed.intermediate_size == theirs.intermediate_size


def test_overrides_take_what_was_derived_with_them() -> None:
    written = {**MambaConfig().to_dict(), "layer_types": ["mamba"] * 32}
    config = MambaConfig.from_dict(written, hidden_size=64, num_hidden_layers=2)
    assert config.intermediate_size == 128
    assert config.layer_types == ["linear_attention"] * 2
    config, unused = MambaConfig.from_dict(
        written, expand=1, nothing_of_ours=1, return_unused_kwargs=True
    )
    assert (config.intermediate_size, unused) == (768, {"nothing_of_ours": 1})


def test_a_fractional_expand_is_taken_where_the_width_is_whole() -> None:
    assert MambaConfig(hidden_size=64, expand=1.5).intermediate_size == 96
    assert type(MambaConfig(expand=2.0).expand) is int


def test_numbers_of_other_libraries_are_stored_as_python_writes_them() -> None:
    config = MambaConfig(hidden_size=np.int64(64), time_step_scale=1, eos_token_id=(np.int32(3),))
    assert type(config.hidden_size) is int
    assert type(config.time_step_scale) is float
    assert config.eos_token_id == [3]
    json.dumps(config.to_dict())


def test_a_token_outside_the_vocabulary_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.enable_propagation()
    try:
        config = MambaConfig(vocab_size=10, pad_token_id=98765)
        assert "pad_token_id" in caplog.text
        assert "98765" in caplog.text
        config.vocab_size = 1  # what resizing the embeddings does
    finally:
        transformers.logging.disable_propagation()


def test_copies_are_equal_and_separate() -> None:
    config = MambaConfig(hidden_size=64, eos_token_id=[1, 2], unknown_field={"a": [1]})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        other.unknown_field["a"].append(2)
        assert other != config
        assert config.unknown_field == {"a": [1]}
    assert config != MambaConfig(hidden_size=64, eos_token_id=[1, 2])
    assert config != TransformersConfig()
    assert (config == 3) is False


def test_the_diff_holds_what_a_reader_needs() -> None:
    written = MambaConfig(hidden_size=64).to_diff_dict()
    assert written["intermediate_size"] == 128
    assert "layer_types" not in written  # Transformers' own class could not be told it
    assert "_name_or_path" not in written
