"""Decode steps of Transformers' mixers in one native call are those of Transformers' own code."""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anymamba.dropin
from anymamba import ops
from anymamba.dropin import mixer_steps
from anymamba.dropin.transformers_finder import MIXERS, MixersFinder
from tests.dropin.transformers_models import model_of
from tests.support.instruction_sets import ISAS, kernels_of
from tests.support.tolerance import assert_each, assert_same

HEADS = (
    *("Mamba2", "Bamba", "Zamba2", "NemotronH", "GraniteMoeHybrid"),
    *("FalconH1", "FalconH1 with norms"),
)
MODELS = ("Mamba", "FalconMamba", "Jamba", *HEADS)
# The design's, of one operator's worst error: a mixer is a whole layer, but a short sum.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.fixture(autouse=True)
def replaced() -> Iterator[None]:
    """The mixers' forward, replaced as the finder does it, whoever imported them before."""
    for module, mixer in MIXERS.items():
        imported = importlib.import_module(module)
        mixer_steps.replace(imported, getattr(imported, mixer))
    yield
    mixer_steps.give_back()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the batch size with each native step."""
    taken: list[int] = []
    native = mixer_steps.Table.step

    def counted(self: Any, hidden_b1d: Tensor, *states: Tensor) -> Tensor:
        taken.append(hidden_b1d.shape[0])
        return native(self, hidden_b1d, *states)

    monkeypatch.setattr(mixer_steps.Table, "step", counted)
    return taken


def mixer_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The first mixer of a small random model."""
    model = model_of(name).eval().to(dtype)
    return next(m for m in model.modules() if type(m).__name__ in MIXERS.values())


class States:
    """A cache of one layer, as Transformers' mixers ask for it."""

    def __init__(self, mixer: Any, batch: int, dtype: torch.dtype) -> None:
        channels, _, k = mixer.conv1d.weight.shape
        self.window = torch.randn(batch, channels, k).to(dtype)
        if mixer.A_log.ndim == 1:
            shape = (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
        else:
            shape = mixer.A_log.shape
        self.state = torch.randn(batch, *shape)
        self.recording = False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.window

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.state

    def is_recording_past(self, layer_idx: int) -> bool:
        return self.recording

    def update_conv_state(self, x_bel: Tensor, layer_idx: int, conv_kernel_size: int) -> Tensor:
        whole = torch.cat([self.window, x_bel], dim=-1)
        self.window.copy_(whole[..., -conv_kernel_size:])
        return whole


def some_steps(mixer: Any, batch: int, dtype: torch.dtype, **arguments: Any) -> list[Tensor]:
    """Outputs of a few steps on inputs of a type, and the states behind them."""
    torch.manual_seed(1)
    own_dtype = mixer.in_proj.weight.dtype
    states = States(mixer, batch, dtype)
    states.window = states.window.to(own_dtype)
    inputs = torch.randn(4, batch, 1, mixer.hidden_size).to(dtype).to(own_dtype)
    outputs = [mixer(x_b1d, cache=states, **arguments) for x_b1d in inputs]
    return [*(out.detach().float() for out in outputs), states.window.float(), states.state]


def own_steps(mixer: Any, batch: int, dtype: torch.dtype, **arguments: Any) -> list[Tensor]:
    """The same by Transformers' own code alone."""
    mixer_steps.give_back()
    try:
        return some_steps(mixer, batch, dtype, **arguments)
    finally:
        mixer_steps.take_again()


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    assert_each(assert_same, ours, theirs, share=TOLERANCES[dtype])


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_agree(name: str, dtype: torch.dtype, batch: int, steps: list[int]) -> None:
    mixer = mixer_of(name, dtype)
    assert mixer_steps.why_not_fused(mixer) is None
    ours = some_steps(mixer, batch, dtype)
    assert steps == [batch] * 4
    # In 16 bits Transformers rounds between all operations, so that it is no measure itself.
    assert_close(ours, own_steps(mixer.float(), batch, dtype), dtype)
    assert len(steps) == 4


@torch.no_grad()
def test_arguments_for_other_layers_do_not_count(steps: list[int]) -> None:
    """Hybrids hand these to all their layers; what a mixer's functions might take is another."""
    mixer = mixer_of("Zamba2")
    expected = some_steps(mixer, 2, torch.float32)
    steps.clear()
    positions = torch.zeros(2, 1, dtype=torch.int64)
    found = some_steps(mixer, 2, torch.float32, position_ids=positions, position_embeddings=None)
    assert steps == [2] * 4
    assert_each(torch.equal, found, expected)
    some_steps(mixer, 2, torch.float32, seq_idx=None)
    assert steps == [2] * 4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_agree_on_every_instruction_set(name: str, isa: str) -> None:
    mixer = mixer_of(name)
    with kernels_of(isa):
        ours = some_steps(mixer, 2, torch.float32)
    assert_close(ours, own_steps(mixer, 2, torch.float32), torch.float32)


@torch.no_grad()
def test_weights_may_change() -> None:
    """In place, in their storage, by loading, by a cast: the next step goes by the new ones."""
    mixer = mixer_of("Mamba")
    changes: list[Callable[[], object]] = [
        lambda: mixer.out_proj.weight.mul_(2),
        lambda: setattr(mixer.in_proj.weight, "data", mixer.in_proj.weight.data * 1.5),
        lambda: setattr(mixer, "D", nn.Parameter(mixer.D + 1)),
        lambda: mixer.load_state_dict(mixer_of("Mamba").state_dict(), assign=True),
        lambda: mixer.double().float(),
    ]
    for change in changes:
        some_steps(mixer, 2, torch.float32)
        change()
        ours = some_steps(mixer, 2, torch.float32)
        assert_close(ours, own_steps(mixer, 2, torch.float32), torch.float32)


def replace_linear(mixer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mixer.in_proj.__class__ = Doubled


def hook(mixer: Any) -> None:
    mixer.out_proj.register_forward_hook(lambda _module, _inputs, out: 2 * out)


def replace_forward(mixer: Any) -> None:
    own = mixer.out_proj.forward
    mixer.out_proj.forward = lambda x: 2 * own(x)


def parametrize(mixer: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(mixer.in_proj)


def subclass(mixer: Any) -> None:
    class Doubled(type(mixer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
            doubled: Tensor = super().forward(2 * hidden_states, **arguments)
            return doubled

    mixer.__class__ = Doubled


def activate_otherwise(mixer: Any) -> None:
    mixer.activation = "relu"


def mix_types(mixer: Any) -> None:
    mixer.A_log.data = mixer.A_log.data.double()


UNUSUAL = [replace_linear, hook, replace_forward, parametrize, subclass, mix_types]


@pytest.mark.parametrize("change", UNUSUAL)
@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
@torch.no_grad()
def test_what_a_program_changed_counts(
    name: str, change: Callable[[Any], None], steps: list[int]
) -> None:
    mixer = mixer_of(name)
    some_steps(mixer, 2, torch.float32)  # a table is there
    steps.clear()
    change(mixer)
    assert mixer_steps.why_not_fused(mixer) is not None
    ours = some_steps(mixer, 2, torch.float32)
    assert steps == []
    assert_close(ours, own_steps(mixer, 2, torch.float32), torch.float32)


@torch.no_grad()
def test_norms_that_a_program_changed_count(steps: list[int]) -> None:
    for name in ("FalconMamba", "Jamba"):
        mixer = mixer_of(name)
        some_steps(mixer, 1, torch.float32)
        steps.clear()
        mixer.b_layernorm.register_forward_hook(lambda _module, _inputs, out: 2 * out)
        some_steps(mixer, 1, torch.float32)
        assert steps == []


def norm_other_groups(mixer: Any) -> None:
    mixer.norm.group_size = mixer.norm.group_size // 2


def norm_before_the_gate(mixer: Any) -> None:
    mixer.norm.norm_before_gate = True


def hook_the_norm(mixer: Any) -> None:
    mixer.norm.register_forward_hook(lambda _module, _inputs, out: 2 * out)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("Bamba", norm_other_groups, "norm: its group_size is 24, expected 48"),
        (
            "FalconH1 with norms",
            norm_before_the_gate,
            "norm: its norm_before_gate is True, expected False",
        ),
        ("Zamba2", hook_the_norm, "norm: it has hooks"),
    ],
)
@torch.no_grad()
def test_gated_norms_that_the_core_lacks(
    name: str, change: Callable[[Any], None], reason: str, steps: list[int]
) -> None:
    mixer = mixer_of(name)
    some_steps(mixer, 1, torch.float32)
    steps.clear()
    change(mixer)
    assert mixer_steps.why_not_fused(mixer) == reason
    ours = some_steps(mixer, 1, torch.float32)
    assert steps == []
    assert_close(ours, own_steps(mixer, 1, torch.float32), torch.float32)


@torch.no_grad()
def test_scales_of_the_projection_may_change() -> None:
    mixer = mixer_of("FalconH1")
    for change in (
        lambda: mixer.mup_vector.mul_(1.5),
        lambda: setattr(mixer, "mup_vector", mixer.mup_vector + 0.25),
        lambda: setattr(mixer, "ssm_in_multiplier", 0.75),
    ):
        some_steps(mixer, 2, torch.float32)
        change()
        ours = some_steps(mixer, 2, torch.float32)
        assert_close(ours, own_steps(mixer, 2, torch.float32), torch.float32)


@torch.no_grad()
def test_an_activation_unknown_to_the_core(steps: list[int]) -> None:
    mixer = mixer_of("Mamba")
    activate_otherwise(mixer)
    assert mixer_steps.why_not_fused(mixer) == "the activation is relu"


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("Mamba", "mamba_selective_state_update"),
        ("Mamba2", "mamba2_selective_state_update"),
        ("Bamba", "causal_conv1d_update"),
    ],
)
@torch.no_grad()
def test_a_function_that_a_program_replaced_is_called(
    name: str, function: str, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    mixer = mixer_of(name)
    some_steps(mixer, 1, torch.float32)
    steps.clear()
    module = sys.modules[type(mixer).__module__]
    called = []
    own = getattr(module, function)
    monkeypatch.setattr(
        module, function, lambda *args, **kwargs: called.append(1) or own(*args, **kwargs)
    )
    some_steps(mixer, 1, torch.float32)
    assert len(called) == 4
    assert steps == []


@pytest.mark.parametrize("how", ["mask", "gradients", "autocast", "backend", "many"])
def test_unusual_calls_are_transformers_own(how: str, steps: list[int]) -> None:
    mixer = mixer_of("Mamba")
    mask = {"attention_mask": torch.ones(2, 1)} if how == "mask" else {}
    batch = 65 if how == "many" else 2
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    backend = ops.backend("reference" if how == "backend" else "auto")
    with torch.set_grad_enabled(how == "gradients"), autocast, backend:
        mixer.A_log.requires_grad_(how != "gradients")
        ours = some_steps(mixer, batch, torch.float32, **mask)
        theirs = own_steps(mixer, batch, torch.float32, **mask)
    assert steps == []
    assert_each(torch.equal, ours, theirs)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hooks_on_the_mixer_itself_run(name: str, steps: list[int]) -> None:
    mixer = mixer_of(name)
    plain = some_steps(mixer, 1, torch.float32)
    mixer.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    doubled = some_steps(mixer, 1, torch.float32)
    assert len(steps) == 8
    assert torch.equal(doubled[0], 2 * plain[0])


@torch.no_grad()
def test_beam_search_gives_the_same_text(steps: list[int]) -> None:
    model = model_of("Mamba").eval()
    ids = torch.randint(2, 97, (2, 5))
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    ours = model.generate(ids, num_beams=3, **arguments)
    assert set(steps) == {6}
    mixer_steps.give_back()
    assert torch.equal(ours, model.generate(ids, num_beams=3, **arguments))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_steps_are_transformers_own(steps: list[int]) -> None:
    mixer = mixer_of("Mamba")
    states = [States(mixer, 1, torch.float32) for _ in range(2)]
    states[1].window, states[1].state = states[0].window + 0, states[0].state + 0
    x_b1d = torch.randn(1, 1, mixer.hidden_size)
    compiled = torch.compile(mixer, backend="eager")
    found = compiled(x_b1d, cache=states[0])
    assert steps == []
    assert_close([found], [mixer(x_b1d, cache=states[1])], torch.float32)
    assert steps == [1]


def test_the_finder_replaces_what_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.models.mamba.modeling_mamba"
    package = importlib.import_module("transformers.models.mamba")
    finder = MixersFinder()
    assert finder.find_spec("transformers.models.llama.modeling_llama", None) is None
    spec = finder.find_spec(name, package.__path__)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # as an import would
    spec.loader.exec_module(module)
    kind = module.MambaMixer
    assert "mixer_steps" in kind.forward.__code__.co_filename
    mixer_steps.give_back()
    assert "modeling_mamba" in kind.forward.__wrapped__.__code__.co_filename + module.__file__
    assert "mixer_steps" not in kind.forward.__code__.co_filename


@pytest.mark.filterwarnings("ignore:Transformers imported its:RuntimeWarning")
def test_the_switch() -> None:
    def asked() -> bool:
        return any(isinstance(finder, MixersFinder) for finder in sys.meta_path)

    try:
        anymamba.dropin.install()
        assert asked()
        anymamba.dropin.install(decode_steps=False)
        assert not asked()
        anymamba.dropin.install(own=["mamba_ssm"])
        assert not asked()
        anymamba.dropin.install()
        assert asked()
    finally:
        anymamba.dropin.uninstall()
    assert not asked()
    reason = mixer_steps.why_not_fused(mixer_of("Mamba"))
    assert reason is not None
    assert "switched off" in reason
