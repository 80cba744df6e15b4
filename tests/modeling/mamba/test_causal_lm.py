"""The language model: losses, what its arguments mean, and what it refuses."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from anymamba import MambaCache, MambaConfig, MambaModel
from anymamba.errors import BackendError, InputError, MissingDependencyError
from anymamba.ops import backends
from tests.support.models import small_model, words
from tests.support.tolerance import assert_same

MODEL = small_model(use_bias=True)
LENGTH = 14


def test_the_loss_shifts_after_the_deletion() -> None:
    ids = words(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 5:9] = mask[1, -2:] = 0
    rows = [ids[row, mask[row].bool()][None] for row in range(2)]
    counts = [row.shape[1] - 1 for row in rows]
    expected = sum(
        MODEL(row, labels=row).loss * count for row, count in zip(rows, counts, strict=True)
    )
    assert_same(MODEL(ids, attention_mask=mask, labels=ids).loss, expected / sum(counts))


def test_labels_of_minus_100_are_ignored() -> None:
    ids = words(1, 6)
    labels = ids.clone()
    labels[0, :4] = -100
    logits = MODEL(ids).logits
    expected = nn.functional.cross_entropy(logits[0, 3:5], ids[0, 4:6])
    assert_same(MODEL(ids, labels=labels).loss, expected)


def test_masks_inside_packed_documents() -> None:
    ids = words(1, 9)
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 0]])
    logits = MODEL(ids, attention_mask=mask, seq_idx=seq_idx).logits
    for positions in ([0, 1, 3], [5, 6, 7]):
        assert_same(logits[:, positions], MODEL(ids[:, positions]).logits)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2, 5])])
def test_logits_to_keep(keep: int | Tensor) -> None:
    ids = words(2, 6)
    logits = MODEL(ids).logits
    expected = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    assert_same(MODEL(ids, logits_to_keep=keep).logits, expected)
    loss = MODEL(ids, labels=ids, logits_to_keep=torch.tensor([0, 1, 2, 3, 4])).loss
    assert_same(loss, MODEL(ids, labels=ids).loss)


@pytest.mark.parametrize("keep", [-1, 2.0, [0, 1], torch.tensor(2), torch.tensor([1.0])])
def test_logits_to_keep_that_keep_nothing_are_refused(keep: Any) -> None:
    with pytest.raises(InputError, match="logits_to_keep"):
        MODEL(words(2, 6), logits_to_keep=keep)


def test_hidden_states_are_the_embeddings_and_each_layers_output() -> None:
    ids = words(2, 6)
    outputs = MODEL(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == MODEL.config.num_hidden_layers + 1
    hidden = MODEL.backbone.embeddings(ids)
    for index, layer in enumerate(MODEL.backbone.layers):
        assert_same(outputs.hidden_states[index], hidden)
        hidden = layer(hidden)
    assert_same(outputs.hidden_states[-1], hidden)


def test_tuples_and_embeddings_as_input() -> None:
    ids = words(2, 6)
    outputs = MODEL(ids, labels=ids)
    loss, logits, cache = MODEL(
        inputs_embeds=MODEL.backbone.embeddings(ids), labels=ids, return_dict=False
    )
    assert_same(logits, outputs.logits)
    assert_same(loss, outputs.loss)
    assert isinstance(cache, MambaCache)
    assert MODEL(ids, use_cache=False).cache is None


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
def test_empty_and_shortest_inputs(shape: tuple[int, int]) -> None:
    outputs = MODEL(words(*shape), attention_mask=torch.ones(shape))
    assert outputs.logits.shape == (*shape, 61)


def test_training_on_a_cache_reads_it_and_does_not_follow_it_back() -> None:
    model = small_model().train()
    ids = words(2, 20)
    cache = MambaCache(model.config, 2, dtype=torch.float32)
    for start in (0, 10):
        piece = ids[:, start : start + 10]
        outputs = model(piece, labels=piece, cache=cache)
        outputs.loss.backward()
        assert not cache.ssm_states.requires_grad
    assert_same(cache.ssm_states, small_model()(ids).cache.ssm_states)


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_the_residual_stream_has_the_type_asked_for(residual_in_fp32: bool) -> None:
    model = small_model(residual_in_fp32=residual_in_fp32).bfloat16()
    hidden = model(words(1, 3), output_hidden_states=True).hidden_states
    assert hidden[-1].dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)


def test_resized_embeddings_and_an_untied_head() -> None:
    model = small_model()
    model.resize_token_embeddings(70)
    assert model(words(1, 3)).logits.shape == (1, 3, 70)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    untied = small_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.backbone.embeddings.weight


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_other_activations_are_transformers_ones(activation: str) -> None:
    model = small_model(hidden_act=activation)
    peer = transformers.MambaForCausalLM(transformers.MambaConfig(**model.config.to_dict())).eval()
    peer.load_state_dict(model.state_dict())
    ids = words(2, 9)
    assert_same(model(ids).logits, peer(ids).logits)


def test_a_convolution_in_another_modules_place_is_called() -> None:
    class Wrapped(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.inner = conv
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model = small_model()
    mixer: Any = model.backbone.layers[0].mixer
    mixer.conv1d = Wrapped(mixer.conv1d)
    ids, mask = words(2, 9), torch.ones(2, 9)
    mask[0, :3] = mask[1, 4:6] = 0
    cache = MambaCache(model.config, 2, dtype=torch.float32)
    logits = [
        model(piece, attention_mask=masked, cache=cache).logits
        for piece, masked in zip(ids.split(4, 1), mask.split(4, 1), strict=True)
    ]
    assert mixer.conv1d.calls
    assert_same(torch.cat(logits, 1), small_model()(ids, attention_mask=mask).logits)


def test_use_mambapy_runs_mambapy_or_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = words(2, 20)
    assert_same(small_model(use_mambapy=True)(ids).logits, small_model()(ids).logits)
    monkeypatch.setattr(backends, "INSTALLED", dict.fromkeys(backends.INSTALLED, False))
    with pytest.raises(MissingDependencyError, match="pip install mambapy"):
        small_model(use_mambapy=True)


def test_initial_weights_follow_the_config() -> None:
    fields = {"time_step_min": 0.01, "time_step_max": 0.02, "time_step_floor": 0.015}
    config = MambaConfig(hidden_size=64, num_hidden_layers=4, vocab_size=99, **fields)
    mixer: Any = MambaModel(config).layers[0].mixer
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    # Inverting softplus in float32 costs about 1e-6 relative.
    assert float(steps.min()) >= 0.015 - 1e-6
    assert float(steps.max()) <= 0.02 + 1e-6
    rates = torch.arange(1.0, 17.0).expand(128, 16)
    assert torch.allclose(mixer.A_log.exp(), rates)
    assert torch.equal(mixer.D, torch.ones(128))
    bound = 4**-0.5
    assert bound * 0.9 < float(mixer.dt_proj.weight.abs().max()) <= bound
    scaled = MambaConfig(hidden_size=64, num_hidden_layers=4, rescale_prenorm_residual=True)
    small: Any = MambaModel(scaled).layers[0].mixer
    assert float(small.out_proj.weight.std()) < 0.6 * float(mixer.out_proj.weight.std())
    constant = MambaConfig(
        hidden_size=64, num_hidden_layers=1, time_step_init_scheme="constant", time_step_scale=2.0
    )
    fixed: Any = MambaModel(constant).layers[0].mixer
    assert torch.equal(fixed.dt_proj.weight, torch.ones(128, 4))


BAD_CALLS: dict[str, dict[str, Any]] = {
    "exactly one of input_ids and inputs_embeds": {"inputs_embeds": torch.ones(2, 6, 24)},
    r"input_ids has shape \(6,\)": {"input_ids": words(1, 6)[0]},
    "attention_mask has shape": {"attention_mask": torch.ones(1, 6)},
    "attention_mask has 5 columns for 6": {"attention_mask": torch.ones(2, 5)},
    "seq_idx has shape": {"seq_idx": torch.ones(2, 5, dtype=torch.long)},
    "cu_seq_lens_q must rise": {"cu_seq_lens_q": torch.tensor([0, 6])},
    "position_ids has shape": {"position_ids": torch.ones(2, 6)},
    "labels has shape": {"labels": torch.ones(2, 5, dtype=torch.long)},
    "cache_position has shape": {"cache_position": torch.ones(2, 2)},
    "expected an anymamba.MambaCache": {"cache": transformers.DynamicCache()},
    "cache holds states of shape": {"cache": MambaCache(MODEL.config, 3)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(InputError, match=message):
        MODEL(**({"input_ids": words(2, 6)} | BAD_CALLS[message]))


def test_a_cache_under_gradient_checkpointing_is_refused() -> None:
    model = small_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient checkpointing"):
        model(words(1, 3), cache=MambaCache(model.config, 1))


def test_a_backend_that_cannot_serve_is_an_error_not_a_detour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ANYMAMBA_BACKEND", "mamba_ssm")
    with pytest.raises(BackendError, match="mamba_ssm"):
        MODEL(words(1, 3))
