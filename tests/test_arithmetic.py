"""The choice of the instruction set and of the type of matrix products, in each of its places."""

import os

import numpy as np
import pytest
import torch

import anymamba
from anymamba import MambaForCausalLM, _core, arithmetic, ops
from anymamba.assets import bundled_model
from anymamba.cli.main import main
from anymamba.errors import BackendError, ConfigError
from tests.support import processes

# What a processor lacks is tested below, by hiding it.
HAS_BFLOAT16 = not {"avx512_bf16", "neon_i8mm"}.isdisjoint(_core.isas())
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="no AVX512-BF16, and no BF16 of Arm")
TEXT = "ROMEO:\nWhat light through yonder window breaks?"


def cli(*arguments: str, **environment: str) -> tuple[int, str]:
    done = processes.python("-m", "anymamba", *arguments, env=os.environ | environment)
    assert done.stderr.count("\n") <= 1
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("variable", ["ANYMAMBA_ISA", "ANYMAMBA_MATMUL_DTYPE"])
def test_a_wrong_variable_is_one_line(variable: str) -> None:
    status, said = cli("generate", "Hi", "--max-new-tokens", "1", **{variable: "foo"})
    assert status == 2
    assert said.startswith(f"anymamba: {variable} is 'foo', ")


def test_info_tells_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info"]) == 0
    assert f"{_core.isa()}; bfloat16 weights are multiplied in float32" in capsys.readouterr().out
    monkeypatch.setenv("ANYMAMBA_MATMUL_DTYPE", "foo")
    assert main(["info"]) == 2
    assert "ANYMAMBA_MATMUL_DTYPE is 'foo'" in capsys.readouterr().err


def test_a_wrong_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="matmul_dtype is 'half', expected float32 or bfloat16"):
        anymamba.load(matmul_dtype="half")
    with pytest.raises(BackendError, match=r"ops.matmul_dtype is 'half'"):
        ops.matmul_dtype("half")
    monkeypatch.setenv("ANYMAMBA_MATMUL_DTYPE", "half")
    with pytest.raises(BackendError, match="ANYMAMBA_MATMUL_DTYPE is 'half'"):
        anymamba.load()


def test_a_processor_without_the_instructions_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_multiplies_bfloat16", lambda: False)
    arithmetic.check_matmul_dtype.cache_clear()
    try:
        for choose in (lambda: anymamba.load(matmul_dtype="bfloat16"), choose_for_operators):
            with pytest.raises(BackendError, match="AVX512-BF16"):
                choose()
    finally:
        arithmetic.check_matmul_dtype.cache_clear()


def choose_for_operators() -> None:
    ops.matmul_dtype("bfloat16")


@needs_bfloat16
def test_the_choice_needs_bfloat16_weights() -> None:
    with pytest.raises(ConfigError, match="--weights bf16"):
        anymamba.load(weights="f32", matmul_dtype="bfloat16")


@needs_bfloat16
def test_the_choice_is_coarser_and_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, coarse = anymamba.load(), anymamba.load(matmul_dtype="bfloat16")
    assert (plain.matmul_dtype, coarse.matmul_dtype) == ("float32", "bfloat16")
    exact = anymamba.load(weights="f32").logits(TEXT)
    size = np.abs(exact).max()
    assert np.abs(plain.logits(TEXT) - exact).max() <= 1e-4 * size
    # The contract's 2e-2 of bfloat16; and more than nothing, so that the choice does something.
    assert 1e-4 * size < np.abs(coarse.logits(TEXT) - exact).max() <= 2e-2 * size
    monkeypatch.setenv("ANYMAMBA_MATMUL_DTYPE", "bfloat16")
    assert np.array_equal(anymamba.load().logits(TEXT), coarse.logits(TEXT))


@needs_bfloat16
def test_models_in_pytorch_have_the_same_choice() -> None:
    model = MambaForCausalLM.from_pretrained(bundled_model(), dtype=torch.bfloat16).eval()
    ids = torch.tensor([anymamba.load().tokenize(TEXT)])
    for name in ("float32", "bfloat16"):
        expected = anymamba.load(matmul_dtype=name).logits(ids[0].tolist())
        with torch.no_grad(), ops.matmul_dtype(name):
            logits = model(ids, use_cache=True).logits[0].float().numpy()
        # PyTorch's face hands its logits out in the model's bfloat16, of 8 bits.
        assert np.abs(logits - expected).max() <= 2**-8 * np.abs(expected).max()


def test_pytorchs_products_of_bfloat16_have_our_arithmetic() -> None:
    """`linear` takes PyTorch's where it is faster: nothing is rounded that ours would not round."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 768, generator=generator).bfloat16()
    weight = torch.randn(64, 768, generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    for backend in ("cpu", "reference"):
        found = ops.linear(x, weight, backend=backend).double()
        # Half a unit in the last of 8 bits, and float32 sums of numbers up to 100.
        assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all(), backend
