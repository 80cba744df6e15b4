"""Better rounding: against brute force, against the method's textbook form, and on a real model."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import anymamba
from anymamba.assets import bundled_model
from anymamba.checkpoint import open_checkpoint
from anymamba.checkpoint.quantization import (
    QuantizedArray,
    dequantize,
    quantize,
    quantized_product,
    round_to,
    scales_of,
    squared_errors,
    values_of,
)
from anymamba.errors import ConfigError, InputError
from anymamba.runtime.analysis.layerwise import Layer, linear, normed
from anymamba.runtime.convert.calibration import (
    Recipe,
    calibrate,
    round_with_feedback,
    search_clip,
    second_moment,
    windows_of,
)
from anymamba.runtime.weights.weights import load_weights
from tests.support.files import SMALL, small_weights
from tests.support.reference import reference_logits, words
from tests.support.tolerance import assert_same


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def inputs(rows: int, k: int, seed: int = 1) -> np.ndarray:
    """Rows whose columns depend on one another, as those that a model computes do."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, k // 4)) @ random.standard_normal((k // 4, k))
    return (x + 0.3 * random.standard_normal((rows, k))).astype(np.float32)


def squared_error(made: QuantizedArray, weight: np.ndarray) -> np.ndarray:
    """(n, g): the squared error of each group."""
    error = (dequantize(made) - weight).astype(np.float64) ** 2
    n, k = weight.shape
    return error.reshape(n, k // made.group, made.group).sum(axis=2)


@given(
    n=st.integers(0, 5),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64]),
    bits=st.sampled_from([8, 4]),
    symmetric=st.booleans(),
    seed=st.integers(0, 10),
)
def test_the_range_is_the_best_of_those_tried(
    n: int, groups: int, group: int, bits: Any, symmetric: bool, seed: int
) -> None:
    weight = weights(n, groups * group, seed) ** 3  # with outliers
    recipe = Recipe(bits, group, symmetric)
    clip = search_clip(weight, recipe)
    found = squared_error(quantize(weight, bits, group, symmetric, clip), weight)
    tried = [
        squared_error(quantize(weight, bits, group, symmetric, share), weight)
        for share in np.linspace(1, 0.6, 9)
    ]
    # The search sums in float32.
    np.testing.assert_allclose(found, np.min(tried, axis=0), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_ranges_do_not_depend_on_who_searches(symmetric: bool) -> None:
    weight = weights(1100, 256) ** 3  # three blocks of rows
    clips = [search_clip(weight, Recipe(4, 32, symmetric, threads=n)) for n in (1, 4)]
    parts = weight.reshape(1100, -1, 32)
    np.testing.assert_array_equal(*clips)
    # Nor on whether the errors are those of the whole numbers as they are stored.
    scale, minimum = scales_of(parts.min(-1), parts.max(-1), 4, symmetric, clips[0])
    errors = values_of(round_to(parts, scale, minimum, 4), scale, minimum, 4) - parts
    np.testing.assert_array_equal(
        squared_errors(parts, scale, minimum, 4, np.empty_like(parts)),
        np.einsum("...p,...p->...", errors, errors),
    )


def test_eight_bits_are_not_searched() -> None:
    weight = weights(3, 64) ** 3
    np.testing.assert_array_equal(
        Recipe(8, 32).rounded(weight, "w").scales, quantize(weight, 8, 32).scales
    )
    assert (Recipe(4, 32).rounded(weight, "w").scales != quantize(weight, 4, 32).scales).any()
    np.testing.assert_array_equal(
        Recipe(4, 32, search=False).rounded(weight, "w").q, quantize(weight, 4, 32).q
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_inputs_that_do_not_depend_on_each_other_leave_nothing_to_make_up_for(
    bits: Any, symmetric: bool, search: bool
) -> None:
    weight, recipe = weights(2500, 128), Recipe(bits, 64, symmetric, search)
    made = round_with_feedback(weight, np.eye(128), recipe)
    plain = recipe.rounded(weight, "w")
    np.testing.assert_array_equal(made.q, plain.q)
    np.testing.assert_array_equal(made.scales, plain.scales)
    if made.minima is not None and plain.minima is not None:
        np.testing.assert_array_equal(made.minima, plain.minima)


@pytest.mark.parametrize("symmetric", [True, False])
def test_feedback_is_the_method_as_its_paper_begins_with_it(symmetric: bool) -> None:
    """Optimal Brain Quantization in a fixed order: the inverse of what is left, anew each time."""
    weight, recipe = weights(6, 64), Recipe(4, 32, symmetric, search=False)
    moment = second_moment([inputs(400, 64)])
    hessian = moment + 0.1 * np.mean(np.diag(moment)) * np.eye(64)
    left, expected = weight.astype(np.float64), np.empty((6, 64))
    scales = np.empty((6, 2))
    for j in range(64):
        if j % 32 == 0:  # a group's scale is chosen once its columns' turn comes
            part = quantize(left[:, j : j + 32].astype(np.float32), 4, 32, symmetric)
            scales[:, j // 32] = part.scales[:, 0]
            step = dequantize(
                QuantizedArray(_all(0, part), part.scales, part.minima, 4, 32, (6, 32))
            )
            last = dequantize(
                QuantizedArray(_all(15, part), part.scales, part.minima, 4, 32, (6, 32))
            )
        numbers = step[:, :1] + (last - step)[:, :1] * np.arange(16) / 15
        nearest = np.abs(numbers - left[:, j, None]).argmin(axis=1)
        expected[:, j] = numbers[np.arange(6), nearest]
        inverse = np.linalg.inv(hessian[j:, j:])
        error = (left[:, j] - expected[:, j]) / inverse[0, 0]
        left[:, j:] -= error[:, None] * inverse[0]
    made = round_with_feedback(weight, moment, recipe)
    np.testing.assert_array_equal(made.scales, scales.astype(np.uint16))
    np.testing.assert_allclose(dequantize(made), expected, atol=1e-5)


def _all(number: int, like: QuantizedArray) -> np.ndarray:
    return np.full_like(like.q, number * 17)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_feedback_lowers_the_error_of_the_products(bits: Any, symmetric: bool) -> None:
    weight, x = weights(40, 128), inputs(1000, 128)
    recipe = Recipe(bits, 32, symmetric)
    made = round_with_feedback(weight, second_moment([x]), recipe)
    errors = [
        np.linalg.norm(x @ (dequantize(one) - weight).T)
        for one in (made, recipe.rounded(weight, "w"))
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("moment", [np.zeros((64, 64)), np.ones((64, 64)), 1e-30 * np.eye(64)])
def test_inputs_that_say_little_do_no_harm(moment: np.ndarray) -> None:
    made = round_with_feedback(weights(5, 64), moment, Recipe(4, 32))
    assert np.abs(dequantize(made) - weights(5, 64)).max() < 1


def test_feedback_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"the moment of head must be \(64, 64\), got \(32, 32\)"):
        round_with_feedback(weights(2, 64), np.eye(32), Recipe(4, 32), "head")
    with pytest.raises(InputError, match="head has rows of 48"):
        round_with_feedback(weights(2, 48), np.eye(48), Recipe(4, 32), "head")
    broken = weights(2, 64)
    broken[0, 0] = np.nan
    for call in (round_with_feedback, lambda w, _, *rest: search_clip(w, *rest)):
        with pytest.raises(InputError, match="head holds NaN"):
            call(broken, np.eye(64), Recipe(4, 32), "head")


def test_the_second_moment_does_not_depend_on_the_stretches() -> None:
    x = inputs(60, 8)
    expected = x.astype(np.float64).T @ x
    for parts in ([x], [x[:7], x[7:]], [x.reshape(3, 20, 8)], list(x[:, None])):
        np.testing.assert_allclose(second_moment(parts), expected, rtol=1e-4, atol=1e-3)
    for wrong in ([], [np.full((1, 2), np.nan, np.float32)]):
        with pytest.raises(InputError, match="finite numbers"):
            second_moment(wrong)


@given(length=st.integers(1, 300), window=st.integers(1, 50), most=st.integers(1, 10))
def test_windows_lie_side_by_side_and_over_all_of_the_text(
    length: int, window: int, most: int
) -> None:
    ids = np.arange(length)
    cut = windows_of(ids, window, most)
    size = min(window, length)
    assert cut.shape == (min(most, length // size), size)
    assert (np.diff(cut, axis=1) == 1).all()
    starts = cut[:, 0]
    assert starts[0] == 0
    assert (np.diff(starts) >= size).all()
    if len(starts) > 1:
        assert starts[-1] + 2 * size > length


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(InputError, match="text is empty"):
        windows_of(np.empty(0, np.int64))


@pytest.mark.parametrize("fields", [{}, {"use_bias": True}, {"use_conv_bias": False}])
def test_layer_by_layer_is_the_model(fields: dict[str, Any]) -> None:
    config, tensors = SMALL | fields, small_weights(**fields)
    ids = [words(9, seed) for seed in (1, 2)]
    hidden = tensors["backbone.embeddings.weight"][ids]
    for index in range(2):
        hidden = Layer.read(index, tensors.get, config).run(hidden)
    last = normed(hidden, tensors["backbone.norm_f.weight"], 1e-5)
    logits = linear(last, tensors["backbone.embeddings.weight"])
    for row, text in zip(logits, ids, strict=True):
        assert_same(row, reference_logits(tensors, text))


def test_a_quantized_matrix_is_multiplied_as_the_kernels_do() -> None:
    made, x, bias = quantize(weights(5, 64), 4, 32), weights(6, 64, 1), weights(1, 5, 2)[0]
    expected = quantized_product(x, made) + bias
    result = linear(x.reshape(2, 3, 64), made, bias)
    # An operator's tolerance in float32.
    assert np.abs(result.reshape(6, 5) - expected).max() <= 1e-5 * np.abs(expected).max()


WIDE = {"hidden_size": 64, "time_step_rank": 4}
LARGE = {
    f"backbone.layers.{i}.mixer.{name}.weight" for i in (0, 1) for name in ("in_proj", "out_proj")
}


def calibrated(tensors: Any, recipe: Recipe, **fields: Any) -> dict[str, QuantizedArray]:
    ids = np.array([words(40, seed) for seed in range(3)])
    return dict(calibrate(tensors.get, SMALL | WIDE | fields, ids, recipe))


@pytest.mark.parametrize("tied", [True, False])
def test_all_large_matrices_are_quantized_once(tied: bool) -> None:
    fields = {"tie_word_embeddings": tied}
    tensors = small_weights(**WIDE, **fields)
    progress: list[tuple[int, int]] = []
    ids = np.array([words(40)])
    recipe = Recipe(4, 32)
    made = list(
        calibrate(
            tensors.get, SMALL | WIDE | fields, ids, recipe, lambda *now: progress.append(now)
        )
    )
    names = [name for name, _ in made]
    head = set() if tied else {"lm_head.weight"}
    assert sorted(names) == sorted(LARGE | {"backbone.embeddings.weight"} | head)
    for name, one in made:
        assert one.shape == tensors[name].shape
        assert (one.bits, one.group, one.symmetric) == (4, 32, True)
    assert progress == [(1, 2), (2, 2)]


def test_a_group_that_does_not_divide_leaves_a_matrix_out() -> None:
    made = calibrated(small_weights(**WIDE), Recipe(4, 128))
    assert set(made) == {name for name in LARGE if "out_proj" in name}  # of width 128


def test_a_matrix_is_calibrated_on_what_the_quantized_ones_before_it_give() -> None:
    tensors, recipe = small_weights(**WIDE), Recipe(4, 64)
    made = calibrated(tensors, recipe)
    hidden = dequantize(made["backbone.embeddings.weight"])[
        np.array([words(40, seed) for seed in range(3)])
    ]
    for index in (0, 1):
        layer, prefix = Layer.read(index, tensors.get, SMALL | WIDE), f"backbone.layers.{index}."
        reads = layer.normed(hidden)
        for name in ("in_proj", "out_proj"):
            if name == "out_proj":
                reads = layer.mixed(reads)
            weight = tensors[f"{prefix}mixer.{name}.weight"]
            expected = round_with_feedback(weight, second_moment([reads]), recipe)
            found = made[f"{prefix}mixer.{name}.weight"]
            np.testing.assert_array_equal(found.q, expected.q)
            setattr(layer, name, expected)
        hidden = layer.added(hidden, reads)


def test_models_and_texts_that_cannot_be_calibrated() -> None:
    tensors = small_weights(**WIDE)
    with pytest.raises(ConfigError, match="hidden_act 'gelu'"):
        calibrated(tensors, Recipe(4, 32), hidden_act="gelu")
    with pytest.raises(ConfigError, match="layer_norm_epsilon 2"):
        calibrated(tensors, Recipe(4, 32), layer_norm_epsilon=2)
    for wrong in (-1, 61):
        with pytest.raises(InputError, match=f"token {wrong}, expected 0 to 60"):
            list(calibrate(tensors.get, SMALL | WIDE, np.array([[0, wrong]]), Recipe(4, 32)))


@pytest.mark.slow
def test_on_the_bundled_model_each_step_lowers_the_error() -> None:
    """On texts that it wrote itself: calibrated on eight of them, held against four others."""
    texts = anymamba.load().generate_batch([[10]] * 12, 256, temperature=1.0, seed=1)
    ids_bl = np.array([text.ids for text in texts])
    model = load_weights(open_checkpoint(bundled_model()), "f32")
    tensors: Any = model.tensors
    large = [name for name in tensors if name.endswith(LARGE_ENDINGS)]
    expected = log_probabilities(tensors, model.config, ids_bl[8:])

    def loss(changed: dict[str, QuantizedArray]) -> float:
        """The nats a token that the changed model's predictions lose against the original's."""
        found = log_probabilities(tensors | changed, model.config, ids_bl[8:])
        return float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())

    plain, searched = (
        {name: Recipe(4, 128, search=search).rounded(tensors[name], name) for name in large}
        for search in (False, True)
    )
    fed_back = dict(calibrate(tensors.get, model.config, ids_bl[:8], Recipe(4, 128)))
    assert sorted(fed_back) == sorted(large)
    assert loss(fed_back) < 0.8 * loss(searched)
    assert loss(searched) < 0.95 * loss(plain)
    assert loss(plain) < 0.02


LARGE_ENDINGS = ("embeddings.weight", "in_proj.weight", "out_proj.weight")


def log_probabilities(tensors: Any, config: Any, ids_bl: np.ndarray) -> np.ndarray:
    """What a model says of each next token, (b, l, v)."""
    table = tensors["backbone.embeddings.weight"]
    hidden = (dequantize(table) if isinstance(table, QuantizedArray) else table)[ids_bl]
    for index in range(config["num_hidden_layers"]):
        hidden = Layer.read(index, tensors.get, config).run(hidden)
    last = normed(hidden, tensors["backbone.norm_f.weight"], 1e-5)
    logits = linear(last, table).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
