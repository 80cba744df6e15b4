"""The specification against scalar loops in float64, Transformers' Mamba, and its own promises."""

import ast
import doctest
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

from anymamba import minimal
from anymamba.minimal import Mamba, ModelArgs
from tests.support import layouts, processes
from tests.support.reference import reference_logits
from tests.support.tolerance import WHOLE_MODEL, assert_same

SHAPES = {
    "plain": ModelArgs(d_model=16, n_layer=2, vocab_size=32),
    "odd": ModelArgs(d_model=7, n_layer=3, vocab_size=11, d_state=5, dt_rank=3, d_conv=3),
    "one of everything": ModelArgs(
        d_model=1, n_layer=1, vocab_size=2, d_state=1, expand=1, dt_rank=1, d_conv=1
    ),
    "biases": ModelArgs(d_model=8, n_layer=1, vocab_size=16, bias=True, conv_bias=True),
    "no biases": ModelArgs(d_model=8, n_layer=1, vocab_size=16, conv_bias=False),
    "wide": ModelArgs(d_model=6, n_layer=1, vocab_size=8, expand=3, d_state=20, d_conv=6),
    "half as wide again": ModelArgs(d_model=10, n_layer=1, vocab_size=8, expand=1.5),
}


def random_model(args: ModelArgs, seed: int = 0) -> Mamba:
    """A model all of whose weights matter: no zeros, no ones, no two alike."""
    torch.manual_seed(seed)
    model = Mamba(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_tokens(args: ModelArgs, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(args.vocab_size, (batch, length), generator=generator)


Weights = dict[str, np.ndarray]


def reference(weights: Weights, tokens: torch.Tensor) -> np.ndarray:
    """The logits of an independent model: in float64, step by step from the paper's formulas."""
    renamed = {
        "lm_head.weight"
        if name == "lm_head.weight"
        else f"backbone.{name.replace('embedding.', 'embeddings.')}": weight
        for name, weight in weights.items()
    }
    return np.array([reference_logits(renamed, row) for row in tokens.tolist()])


def weights_of(model: Mamba) -> Weights:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", SHAPES)
def test_forward_equals_scalar_loops(name: str) -> None:
    args = SHAPES[name]
    model = random_model(args)
    tokens = random_tokens(args, batch=2, length=9)
    expected = reference(weights_of(model), tokens)
    assert_same(model(tokens).double(), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["odd", "biases"])
def test_gradients_equal_differences_of_scalar_loops(name: str) -> None:
    """Along a random direction in each tensor, by central differences in float64."""
    args = SHAPES[name]
    model = random_model(args)
    tokens = random_tokens(args, batch=1, length=6)
    rng = np.random.default_rng(0)
    pull = rng.standard_normal((1, 6, args.vocab_size)) / 10
    (model(tokens) * torch.from_numpy(pull).float()).sum().backward()

    for tensor, parameter in model.named_parameters():
        direction = rng.standard_normal(tuple(parameter.shape))
        # Differences are exact to about step², far below float32's own error.
        step = 1e-5
        ends = []
        for sign in (1, -1):
            weights = weights_of(model)
            weights[tensor] = weights[tensor] + sign * step * direction
            if tensor == "embedding.weight":
                weights["lm_head.weight"] = weights[tensor]
            ends.append(float((reference(weights, tokens) * pull).sum()))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert parameter.grad is not None
        actual = float((parameter.grad.double().numpy() * direction).sum())
        assert actual == pytest.approx(expected, abs=WHOLE_MODEL * max(1.0, abs(expected))), tensor


# --- what it promises ------------------------------------------------------------------------


def test_no_position_sees_a_later_one() -> None:
    model = random_model(SHAPES["plain"])
    tokens = random_tokens(model.args, batch=1, length=12)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % model.args.vocab_size
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:5], after[:5])
    # ... while every later one does see this one, beyond the convolution's reach too.
    assert ((before[5:] - after[5:]).abs().amax(dim=-1) > 1e-4).all()


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0), (1, 1), (2, 2)])
def test_empty_and_short_inputs(batch: int, length: int) -> None:
    model = random_model(SHAPES["plain"])
    tokens = random_tokens(model.args, batch, length)
    logits = model(tokens)
    assert logits.shape == (batch, length, model.args.vocab_size)
    logits.sum().backward()
    # A short input is the start of a long one.
    longer = F.pad(tokens, (0, 4))
    assert_same(logits, model(longer)[:, :length])


def test_parameter_names_are_those_of_the_original_checkpoints() -> None:
    names = set(Mamba(ModelArgs(d_model=8, n_layer=1, vocab_size=8, bias=True)).state_dict())
    mixer = {"A_log", "D", "x_proj.weight"}
    for linear in ("in_proj", "conv1d", "dt_proj", "out_proj"):
        mixer |= {f"{linear}.weight", f"{linear}.bias"}
    assert names == {
        "embedding.weight",
        "norm_f.weight",
        "lm_head.weight",
        "layers.0.norm.weight",
    } | {f"layers.0.mixer.{name}" for name in mixer}


def test_every_field_shapes_the_model() -> None:
    args = ModelArgs(
        d_model=10,
        n_layer=3,
        vocab_size=13,
        d_state=6,
        expand=3,
        dt_rank=4,
        d_conv=5,
        pad_vocab_size_multiple=7,
        conv_bias=False,
        bias=True,
    )
    shapes = {name: tuple(value.shape) for name, value in Mamba(args).state_dict().items()}
    assert shapes["embedding.weight"] == (14, 10)
    assert shapes["layers.2.mixer.A_log"] == (30, 6)
    assert shapes["layers.2.mixer.in_proj.weight"] == (60, 10)
    assert shapes["layers.2.mixer.x_proj.weight"] == (4 + 2 * 6, 30)
    assert shapes["layers.2.mixer.dt_proj.weight"] == (30, 4)
    assert shapes["layers.2.mixer.conv1d.weight"] == (30, 1, 5)
    assert shapes["layers.2.mixer.out_proj.bias"] == (10,)
    assert shapes["layers.2.mixer.in_proj.bias"] == (60,)
    assert "layers.2.mixer.conv1d.bias" not in shapes
    assert "layers.3.norm.weight" not in shapes


def test_rank_and_vocabulary_are_derived() -> None:
    args = ModelArgs(d_model=17, n_layer=1, vocab_size=50277)
    assert (args.dt_rank, args.d_inner, args.vocab_size) == (2, 34, 50280)
    assert ModelArgs(d_model=17, n_layer=1, vocab_size=50280).vocab_size == 50280


WRONG = {
    "d_model": (0, "128"),
    "n_layer": (-1, True),
    "vocab_size": (1.5,),
    "d_state": (0,),
    "expand": (None, True, 0.1, float("nan"), float("inf")),
    "dt_rank": ("automatic", 0),
    **dict.fromkeys(("d_conv", "pad_vocab_size_multiple"), (0,)),
    "conv_bias": (1,),
    "bias": ("no",),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values]
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    good: dict[str, object] = {"d_model": 8, "n_layer": 1, "vocab_size": 8}
    with pytest.raises(ValueError, match=r"must be") as refusal:
        ModelArgs(**{**good, field: value})  # type: ignore[arg-type]
    assert str(refusal.value).startswith(f"{field} must be ")
    assert repr(value) in str(refusal.value)


def test_tokens_without_a_batch_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(batch, length\), got \(3,\)"):
        Mamba(SHAPES["plain"])(torch.tensor([1, 2, 3]))


def test_initial_values_are_those_of_the_paper() -> None:
    mixer = Mamba(ModelArgs(d_model=64, n_layer=4, vocab_size=8)).layers[2].mixer
    A_en = -torch.exp(mixer.A_log)
    torch.testing.assert_close(A_en, -torch.arange(1.0, 17).expand(128, 16))
    step_e = F.softplus(mixer.dt_proj.bias)
    # softplus and its inverse round: a relative 1e-3 at the lower end, where it is near log 1.
    assert step_e.min() >= 1e-3 * 0.999
    assert step_e.max() <= 1e-1 * 1.001
    # Evenly on a log scale: of 128 steps about half lie below the geometric mean, 0.01; 3 σ = 17.
    assert 64 - 17 <= (step_e < 1e-2).sum() <= 64 + 17


@pytest.mark.slow
def test_it_learns_from_scratch_what_only_memory_can_know() -> None:
    """Recall, after seven tokens of noise, the one that came first: chance is log 8 = 2.08."""
    torch.manual_seed(0)
    model = Mamba(ModelArgs(d_model=32, n_layer=2, vocab_size=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(150):
        tokens = torch.randint(8, 16, (32, 8))
        tokens[:, 0] -= 8  # the token to remember is one of 0 ... 7, the noise one of 8 ... 15
        loss = F.cross_entropy(model(tokens)[:, -1], tokens[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # At the scale of its initial values: how much rounding grows is a property of the weights.
    model = Mamba(ModelArgs(d_model=32, n_layer=2, vocab_size=32)).to(dtype)
    tokens = random_tokens(model.args, batch=2, length=20)
    in_half = model(tokens)
    assert in_half.dtype == torch.float32
    # The same rounded weights, computed in float32: the contract's figure for 16-bit storage.
    assert_same(in_half, model.float()(tokens), 2e-2)

    seen = []
    scan = minimal.MambaBlock.selective_scan

    def spy(self: minimal.MambaBlock, *tensors: torch.Tensor) -> torch.Tensor:
        seen.extend(tensor.dtype for tensor in tensors)
        return scan(self, *tensors)

    monkeypatch.setattr(minimal.MambaBlock, "selective_scan", spy)
    model.to(dtype)(tokens)
    assert seen
    assert set(seen) == {torch.float32}


def test_head_and_embedding_are_one_matrix() -> None:
    model = Mamba(SHAPES["plain"])
    assert model.lm_head.weight is model.embedding.weight


def test_the_module_prints_the_classic_shape(capsys: pytest.CaptureFixture[str]) -> None:
    """As the README's `python -m anymamba.minimal`, which a test of the documentation runs."""
    minimal.main()
    assert capsys.readouterr().out == "torch.Size([2, 200, 32000])\n"


def test_examples_in_the_docstrings() -> None:
    outcome = doctest.testmod(minimal)
    assert outcome.attempted >= 8
    assert outcome.failed == 0


# --- the names that walk-throughs of Mamba use -------------------------------------------------


@pytest.mark.slow
def test_it_runs_where_it_was_copied_to(tmp_path: Path) -> None:
    """Alone, in a process that cannot find the package."""
    (tmp_path / "one_file.py").write_bytes(Path(minimal.__file__).read_bytes())
    program = (
        "import sys; sys.modules['anymamba'] = None; import torch; import one_file as m\n"
        "model = m.Mamba(m.ModelArgs(d_model=16, n_layer=2, vocab_size=40))\n"
        "print(model(torch.zeros(2, 9, dtype=torch.int64)).shape)"
    )
    run = processes.python("-c", program, cwd=tmp_path, check=True)
    assert run.stdout == "torch.Size([2, 9, 40])\n"


def test_arguments_and_attributes_have_the_walkthroughs_names() -> None:
    args = SHAPES["half as wide again"]
    model = Mamba(args)
    block = model.layers[0].mixer
    assert model.args is model.layers[0].args is block.args is args
    assert args.d_inner == 15
    batch, length, inner, n = 2, 5, args.d_inner, args.d_state
    named = {
        "u": torch.randn(batch, length, inner),
        "delta": torch.rand(batch, length, inner),
        "A": -torch.rand(inner, n),
        "B": torch.randn(batch, length, n),
        "C": torch.randn(batch, length, n),
        "D": torch.randn(inner),
    }
    y = block.selective_scan(*named.values())
    assert torch.equal(y, block.selective_scan(**named))
    without_D = block.selective_scan(**named | {"D": torch.zeros(inner)})
    torch.testing.assert_close(y, without_D + named["D"] * named["u"])
    assert minimal.RMSNorm(d_model=8)(torch.ones(1, 8)).shape == (1, 8)


def test_the_first_outputs_of_the_convolution_are_the_causal_ones() -> None:
    block = random_model(SHAPES["wide"]).layers[0].mixer
    x_bel = torch.randn(2, block.args.d_inner, 7)
    w_ek = block.conv1d.weight[:, 0]
    expected = torch.zeros_like(x_bel)
    for t in range(7):
        for j in range(block.args.d_conv):
            if t - j >= 0:
                expected[:, :, t] += w_ek[:, -1 - j] * x_bel[:, :, t - j]
    assert_same(block.conv1d(x_bel)[:, :, :7], expected + block.conv1d.bias[:, None])


def test_hooks_of_every_module_run() -> None:
    model = random_model(SHAPES["plain"])
    names = {
        name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)
    }
    seen = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(random_tokens(model.args, batch=1, length=3))
    assert seen == names


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("layout", ["transformers", "original", "minimal"])
def test_every_layout_is_read(layout: str, pickled: bool, tmp_path: Path) -> None:
    folder = layouts.write_model(tmp_path, layout, pickled=pickled)
    loaded = Mamba.from_pretrained(folder).state_dict()
    expected = layouts.renamed("minimal", layouts.weights())
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_shards_and_a_head_of_its_own_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        **layouts.TRANSFORMERS_CONFIG | {"tie_word_embeddings": False, "expand": 3}
    )
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="2kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = Mamba.from_pretrained(tmp_path)
    tokens = random_tokens(ours.args, batch=2, length=9)
    with torch.no_grad():
        assert_same(ours(tokens), theirs(tokens, use_cache=False).logits)


@pytest.mark.parametrize(
    ("changes", "dropped", "message"),
    [
        ({"hidden_act": "gelu"}, (), "silu"),
        ({"layer_norm_epsilon": 1e-6}, (), "1e-5"),
        ({"model_type": "falcon_mamba"}, (), "Mamba-1"),
        ({"num_hidden_layers": 3}, (), "Missing key"),
        ({}, ("backbone.embeddings.weight",), "Missing key"),
        ({"tie_word_embeddings": False}, (), "Missing key"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    changes: dict[str, object], dropped: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in layouts.weights().items() if name not in dropped}
    layouts.write_model(tmp_path, tensors=tensors, **changes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        Mamba.from_pretrained(tmp_path)


def test_another_head_than_a_tied_one_is_refused(tmp_path: Path) -> None:
    layouts.write_model(tmp_path, tensors=layouts.weights() | {"lm_head.weight": torch.ones(16, 6)})
    with pytest.raises(ValueError, match="tied"):
        Mamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("pickled", [False, True])
def test_what_a_trainer_leaves_beside_the_weights_is_not_read(
    pickled: bool, tmp_path: Path
) -> None:
    folder = layouts.write_model(tmp_path, pickled=pickled)
    torch.save({"folder": Path("runs")}, folder / "training_args.bin")
    save_file({"a.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    Mamba.from_pretrained(folder)


def test_it_stays_one_short_file_of_plain_pytorch() -> None:
    source = Path(minimal.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 400
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    # The last two are imported in the functions that load checkpoints.
    assert foreign == {"torch", "torch.nn.functional", "huggingface_hub", "safetensors.torch"}
