"""Which tensors a config asks for, and how differences are reported."""

import pytest

from anymamba.checkpoint import check_tensors, expected_shapes, model_shape
from anymamba.errors import CheckpointError, ConfigError
from tests.support.files import refusal
from tests.support.layouts import TRANSFORMERS_CONFIG, weights


def test_the_shapes_spelt_out_by_hand():
    assert expected_shapes(TRANSFORMERS_CONFIG) == {n: tuple(t.shape) for n, t in weights().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bias": True},
        {"use_conv_bias": False},
        {"tie_word_embeddings": False},
        {"expand": 3, "time_step_rank": "auto", "hidden_size": 33},
        {"state_size": 1, "conv_kernel": 2, "num_hidden_layers": 1},
    ],
)
def test_agrees_with_transformers(changes):
    transformers = pytest.importorskip("transformers")
    fields = TRANSFORMERS_CONFIG | changes
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**fields))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if fields["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    assert expected_shapes(fields) == shapes


def test_defaults_are_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MambaConfig().to_dict() | {"time_step_rank": "auto"}
    assert model_shape({}) == model_shape(theirs)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", value) for value in (0, -4, 2**40, "8", True)),
        ("vocab_size", None),
        ("state_size", 1.5),
        ("num_hidden_layers", 10**9),
        ("expand", float("nan")),
        ("conv_kernel", [4]),
        ("time_step_rank", "full"),
        ("use_bias", 1),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_values_that_make_no_sense(field, value):
    message = refusal(ConfigError, expected_shapes, {field: value})
    assert field in message
    assert repr(value) in message


def test_one_error_names_all_differences():
    found = expected_shapes(TRANSFORMERS_CONFIG)
    del found["backbone.norm_f.weight"], found["backbone.layers.1.mixer.D"]
    found["backbone.layers.0.mixer.A_log"] = (12, 7)
    found["rope.inv_freq"] = (3,)
    found["scalar"] = ()
    expected = expected_shapes(TRANSFORMERS_CONFIG)
    assert refusal(CheckpointError, check_tensors, found, expected, "'there'") == (
        "the tensors in 'there' do not fit its config: "
        "missing backbone.layers.1.mixer.D, backbone.norm_f.weight; "
        "unexpected 'rope.inv_freq', 'scalar'; "
        "of a wrong shape backbone.layers.0.mixer.A_log is 12×7, expected 12×5"
    )


def test_long_lists_are_shortened():
    expected = expected_shapes(TRANSFORMERS_CONFIG | {"num_hidden_layers": 40})
    message = refusal(CheckpointError, check_tensors, {}, expected, "there")
    assert "and 392 more" in message


def test_a_repeated_head_is_no_difference():
    expected = expected_shapes(TRANSFORMERS_CONFIG)
    check_tensors(expected | {"lm_head.weight": (16, 6)}, expected, "there")
    untied = expected_shapes(TRANSFORMERS_CONFIG | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        check_tensors(expected, untied, "there")
