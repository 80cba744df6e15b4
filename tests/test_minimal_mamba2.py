"""The specification of Mamba-2 against loops in float64, and its promises; the contract of
`tests/parity` holds it to Transformers' class."""

from __future__ import annotations

import ast
import doctest
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anymamba import minimal_mamba2
from anymamba.minimal_mamba2 import Mamba2, ModelArgs, chunked, recurrence
from tests.support.tolerance import assert_same

BASE = ModelArgs(d_model=16, n_layer=2, vocab_size=32, d_state=8, headdim=8)


def random_model(args: ModelArgs) -> Mamba2:
    """A model all of whose weights matter: no zeros, no ones, no two alike."""
    torch.manual_seed(0)
    model = Mamba2(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_tokens(args: ModelArgs, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(args.vocab_size, (batch, length), generator=generator)


def loop(x, delta, A, B, C):  # type: ignore[no-untyped-def]
    """The recurrence number by number, in Python's floats."""
    y = np.zeros(x.shape)
    for b, h, p in np.ndindex(x.shape[0], *x.shape[2:]):
        state = [0.0] * B.shape[-1]
        for t in range(x.shape[1]):
            for n in range(len(state)):
                decay = np.exp(delta[b, t, h] * A[h])
                state[n] = decay * state[n] + delta[b, t, h] * x[b, t, h, p] * B[b, t, h, n]
                y[b, t, h, p] += C[b, t, h, n] * state[n]
    return y


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(0, 12),
    chunk=st.integers(1, 14),
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    seed=st.integers(0, 99),
)
def test_recurrence_and_chunks_equal_a_scalar_loop(
    length: int, chunk: int, sizes: tuple[int, ...], seed: int
) -> None:
    b, h, p, n = sizes
    torch.manual_seed(seed)
    x, delta = torch.randn(b, length, h, p).double(), torch.rand(b, length, h).double()
    A, B, C = (t.double() for t in (-torch.rand(h) * 3, *torch.randn(2, b, length, h, n)))
    expected = loop(*(t.numpy() for t in (x, delta, A, B, C)))
    # float64 throughout; the orders of the sums differ.
    assert_same(recurrence(x, delta, A, B, C), expected, 1e-12)
    assert_same(chunked(x, delta, A, B, C, chunk), expected, 1e-12)


def test_decays_that_underflow_leave_no_nan() -> None:
    x, delta = torch.randn(1, 9, 1, 2), torch.full((1, 9, 1), 300.0)
    A, B, C = torch.tensor([-2.0]), torch.randn(1, 9, 1, 3), torch.randn(1, 9, 1, 3)
    assert_same(chunked(x, delta, A, B, C, 4), recurrence(x, delta, A, B, C), 1e-5)


def test_derivatives() -> None:
    torch.manual_seed(0)
    inputs = (
        torch.randn(1, 5, 2, 2).double(),
        torch.rand(1, 5, 2).double(),
        -torch.rand(2).double(),
        *torch.randn(2, 1, 5, 2, 3).double(),
    )
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: chunked(*tensors, 2), inputs)


def twin(model: Mamba2) -> transformers.Mamba2ForCausalLM:
    """Transformers' model of the same weights."""
    args = model.args
    config = transformers.Mamba2Config(
        vocab_size=args.vocab_size,
        hidden_size=args.d_model,
        state_size=args.d_state,
        num_hidden_layers=args.n_layer,
        layer_norm_epsilon=args.eps,
        expand=args.expand,
        num_heads=args.nheads,
        head_dim=args.headdim,
        n_groups=args.ngroups,
        conv_kernel=args.d_conv,
        chunk_size=args.chunk_size,
        time_step_limit=args.dt_limit,
        use_bias=args.bias,
        use_conv_bias=args.conv_bias,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.load_state_dict(
        {
            name if name.startswith("lm_head") else f"backbone.{name.replace('ding.', 'dings.')}": w
            for name, w in model.state_dict().items()
        }
    )
    return theirs


@pytest.mark.parametrize("tied", [True, False])
def test_both_layouts_load(tied: bool, tmp_path: Path) -> None:
    model = random_model(BASE)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.embedding.weight))
    theirs = twin(random_model(BASE))
    theirs.config.tie_word_embeddings = tied
    if not tied:
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.embedding.weight))
        theirs.load_state_dict({"lm_head.weight": model.lm_head.weight}, strict=False)
    theirs.save_pretrained(tmp_path / "transformers")
    original = tmp_path / "original"
    original.mkdir()
    weights = {f"backbone.{n}": w for n, w in model.state_dict().items() if "lm_head" not in n}
    save_file(
        weights | {"lm_head.weight": model.lm_head.weight.clone()}, original / "model.safetensors"
    )
    layer = {"layer": "Mamba2", "d_state": 8, "headdim": 8}
    fields = {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": 32,
        "ssm_cfg": layer,
        "tie_embeddings": tied,
    }
    (original / "config.json").write_text(json.dumps(fields))
    tokens = random_tokens(BASE, 1, 9)
    for folder in ("transformers", "original"):
        assert_same(Mamba2.from_pretrained(tmp_path / folder)(tokens), model(tokens), 1e-6)


@pytest.mark.parametrize(
    ("changes", "word"), [({"headdim": 7}, "headdim is 7"), ({"ngroups": 3}, "ngroups is 3")]
)
def test_sizes_that_do_not_fit(changes: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(BASE, **changes)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="a Mamba-2"):
        minimal_mamba2.args_of({"model_type": "mamba", "hidden_size": 8})


def test_norm_before_gate_norms_before_the_gate() -> None:
    y, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    gate = torch.nn.functional.silu(z)
    for before in (True, False):
        norm = minimal_mamba2.RMSNorm(8, 1e-5, 2, before)
        rows = (y if before else y * gate).view(2, 3, 2, 4)
        expected = torch.nn.functional.rms_norm(rows, (4,), eps=1e-5).view(2, 3, 8)
        assert_same(norm(y, z), expected * gate if before else expected, 1e-6)


def test_examples_and_independence() -> None:
    assert doctest.testmod(minimal_mamba2).failed == 0
    tree = ast.parse(Path(minimal_mamba2.__file__).read_text(encoding="utf-8"))
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any(name.startswith("anymamba") for name in imported)
