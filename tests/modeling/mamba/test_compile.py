"""The model under compilers, tracers and counters, on devices without numbers, and with other
defaults than PyTorch's."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from anymamba import MambaCache, MambaConfig, MambaForCausalLM, ops
from anymamba.dropin.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.ops.ssd.chunk import Inputs
from anymamba.ops.ssd.chunked import run_backward, run_forward
from tests.support.models import small_model, words
from tests.support.tolerance import assert_each, assert_same

pytestmark = pytest.mark.slow

MASKS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: MambaForCausalLM, forward: Callable[..., Any], ids: Tensor) -> list[Tensor]:
    """Of three stretches of a text, each of which continues the last one's cache."""
    model.zero_grad()
    cache = MambaCache(model.config, ids.shape[0], dtype=torch.float32)
    for part in ids.split(4, dim=1):
        forward(part, labels=part, cache=cache).loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_inductor_gradients_with_a_cache() -> None:
    """The state that the backward pass needs is overwritten in the forward pass."""
    model, ids = small_model(num_hidden_layers=1, hidden_size=8).train(), words(2, 12)
    expected = gradients(model, model, ids)
    found = gradients(model, torch.compile(model, dynamic=False), ids)
    assert_each(assert_same, found, expected)


class OnlyLogits(nn.Module):
    """Tensors in, tensors out, as exporters and tracers want it."""

    def __init__(self, model: MambaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(ids, attention_mask=mask, use_cache=False).logits
        return logits


@pytest.mark.parametrize("strict", [False, True])
def test_exported_once_for_every_batch_length_and_mask(strict: bool) -> None:
    model = OnlyLogits(small_model())
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    inputs = (words(3, 6), MASKS)
    exported = torch.export.export(model, inputs, dynamic_shapes=(free, free), strict=strict)
    with torch.no_grad():
        assert_same(exported.module()(*inputs), model(*inputs))
        ids, mask = words(2, 70), torch.ones(2, 70, dtype=torch.int64)
        mask[0, 20:60] = mask[1, :69] = 0
        assert_same(exported.module()(ids, mask), model(ids, mask))


def test_compiled_with_masks_and_a_cache() -> None:
    """One graph gives what the model gives: logits, loss, gradients, and the state after."""
    model, ids = small_model(), words(3, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for forward in (model, compiled):
        model.zero_grad()
        cache = MambaCache(model.config, 3, dtype=torch.float32)
        forward(ids, attention_mask=MASKS, cache=cache)
        output = forward(ids, attention_mask=1 - MASKS, labels=ids, cache=cache)
        output.loss.backward()
        grads = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        blocks = [cache.conv_states, cache.ssm_states, cache.token_counts.float()]
        results.append([output.logits, output.loss, *grads, *blocks])
    assert_each(assert_same, results[1], results[0])


@pytest.mark.parametrize("grad", [False, True])
def test_traced(grad: bool) -> None:
    """A trace holds the operators and no number of the example."""
    model, ids, other = OnlyLogits(small_model()), words(2, 6), words(2, 6, seed=2)
    with torch.set_grad_enabled(grad):
        expected = model(other)
        traced = torch.jit.trace(model, (ids,), check_trace=False)
        assert_same(traced(other), expected)
        assert_same(make_fx(model)(ids)(other), expected)
        assert_same(make_fx(model)(ids, MASKS[:2])(other, MASKS[1:]), model(other, MASKS[1:]))


def test_counted_as_written_down() -> None:
    """FLOPs of the scan and of the products, in a pass that the fused path would have taken.

    The counter sets hooks for all modules, so that projections and convolution are called as
    PyTorch's own and counted by its formulas.
    """
    model, (b, l) = small_model(), (2, 6)
    d, e, n, r, v, layers = 24, 48, 5, 2, 61, 2
    products = layers * (d * 2 * e + e * (r + 2 * n) + r * e + e * d) + d * v
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(words(b, l))
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.anymamba.selective_scan] == b * l * layers * 7 * e * n
    assert counts[torch.ops.aten.mm] == b * l * 2 * products
    x, weight = torch.randn(b, l, e), torch.randn(d, e, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.linear(ops.causal_conv1d(x, torch.randn(e, 4)), weight).sum().backward()
    assert counter.get_total_flops() == b * l * (2 * e * 4 + 2 * 2 * e * d)


def test_the_duality_is_counted_as_its_products() -> None:
    """Its formulas against PyTorch's count of the matrix products inside, for whole chunks."""
    x, dt, A = torch.randn(2, 12, 4, 3), torch.rand(2, 12, 4), -torch.rand(4)
    B, C = torch.randn(2, 2, 12, 2, 5)
    call = (x, dt, A, B, C, None, None, None)
    inputs = Inputs(*call, 2, 4)
    # PyTorch's counter leaves out the products that add to a tensor in place.
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as inside:
        run_forward(inputs, (torch.empty_like(x), torch.empty(2, 4, 3, 5)))
    with FlopCounterMode(display=False) as whole:
        torch.ops.anymamba.ssd_chunked(*call, 2, 4)
    assert whole.get_total_flops() == inside.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=in_place) as inside:
        gradients = [None if t is None else torch.empty_like(t) for t in call[:7]]
        run_backward(inputs, (), x, None, gradients)
    with FlopCounterMode(display=False) as whole:
        torch.ops.anymamba.ssd_chunked_backward(*call, x, None, 2, 4)
    assert whole.get_total_flops() == inside.get_total_flops()


def test_shapes_without_numbers() -> None:
    config = small_model().config
    ids = torch.zeros(2, 6, dtype=torch.int64)
    for place in (torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True)):
        with place:
            model = MambaForCausalLM(config)
            inputs, mask = torch.zeros_like(ids), torch.ones_like(ids)
            output = model(inputs, attention_mask=mask, labels=inputs)
            assert output.logits.shape == (2, 6, 61)
            output.loss.backward()
            step = model.eval()(inputs[:, :1], cache=output.cache)
            assert step.logits.shape == (2, 1, 61)
            layer = Mamba(16, device=inputs.device)
            assert layer(torch.zeros(2, 5, 16, device=inputs.device)).shape == (2, 5, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_default_dtypes(dtype: torch.dtype) -> None:
    """A program's default decides how wide new weights are, and nothing about a model at hand."""
    model, ids = small_model(), words(2, 6)
    layer, x = Mamba(16), torch.randn(2, 5, 16)
    expected = [model(ids, attention_mask=MASKS[:2]).logits, layer(x)]
    with torch.no_grad():
        expected += [model(ids).logits, model.generate(ids, max_new_tokens=3).float()]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [model(ids, attention_mask=MASKS[:2]).logits, layer(x)]
        with torch.no_grad():
            found += [model(ids).logits, model.generate(ids, max_new_tokens=3).float()]
        new = MambaForCausalLM(MambaConfig(**model.config.to_diff_dict() | {"dtype": None}))
        assert new(ids).logits.isfinite().all()
        assert new.dtype == dtype
        cache = MambaCache(model.config, 2, dtype=torch.float32)
        assert cache.ssm_states.dtype == torch.float32
        assert Mamba(16)(x.to(dtype)).dtype == dtype
    finally:
        torch.set_default_dtype(before)
    assert_each(torch.equal, found, expected)


def test_another_default_device() -> None:
    model, ids = small_model(), words(2, 6)
    with torch.no_grad():
        expected = [model(ids).logits, model(ids, attention_mask=MASKS[:2]).logits]
        with torch.device("meta"):
            found = [model(ids).logits, model(ids, attention_mask=MASKS[:2]).logits]
    assert_each(torch.equal, found, expected)


def test_deterministic_algorithms_and_inference_mode() -> None:
    model, ids = small_model(), words(2, 6)
    expected = model(ids, attention_mask=MASKS[:2], labels=ids)
    torch.use_deterministic_algorithms(True)
    try:
        found = model(ids, attention_mask=MASKS[:2], labels=ids)
        found.loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.logits, expected.logits)
    with torch.inference_mode():
        output = model(ids, attention_mask=MASKS[:2])
        assert_same(output.logits.clone(), expected.logits)
        model(ids, cache=output.cache)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_of_every_linear_layer() -> None:
    """8 bits a weight and an activation move a logit by some percent of the largest."""
    model, ids = small_model(), words(2, 6)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    error = (small(ids).logits - model(ids).logits).abs().max() / model(ids).logits.abs().max()
    assert error < 0.1
    layer, x = Mamba(16), torch.randn(2, 5, 16)
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert (small(x) - layer(x)).abs().max() < 0.1 * layer(x).abs().max()


def test_tangents_of_the_model() -> None:
    """Forward mode through the whole model, with the cache that evaluation makes by default."""
    model = small_model().double()
    x, direction = torch.randn(2, 5, 24).double(), torch.randn(2, 5, 24).double()

    def logits(x: Tensor) -> Tensor:
        result: Tensor = model(inputs_embeds=x, use_cache=False).logits
        return result

    numerical = (logits(x + 1e-4 * direction) - logits(x - 1e-4 * direction)) / 2e-4
    # The head's product is float64, its result float32: differences keep about four digits.
    bound = 1e-2 * float(numerical.abs().max())
    tangent = torch.func.jvp(logits, (x,), (direction,))[1]
    assert float((tangent - numerical).abs().max()) < bound
    single = small_model().float()
    tangent = torch.func.jvp(
        lambda x: single(inputs_embeds=x, use_cache=False).logits,
        (x.float(),),
        (direction.float(),),
    )[1]
    assert float((tangent - numerical).abs().max()) < bound


def test_the_first_call_of_a_process() -> None:
    """Nothing is imported, looked up or made at a first call that a compiler could not follow."""
    program = """
import torch
from anymamba import MambaConfig, MambaForCausalLM
model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1))
ids = torch.tensor([[1, 2, 3]])
got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
assert torch.allclose(got, model(ids).logits, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=300)
