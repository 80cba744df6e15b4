"""The trainer: its recipe, its states, and what is left of it in the result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaForCausalLM as TransformersMamba

from anymamba import MambaForCausalLM
from anymamba.errors import ConfigError, InputError, TrainingError
from anymamba.modeling.auto import load_causal_lm
from anymamba.training.data.documents import held_out, tokenize
from anymamba.training.data.tokenizers import open_tokenizer
from anymamba.training.lifecycle.report import read_metrics
from anymamba.training.pretrain.run import new_model, train
from anymamba.training.pretrain.trainer import MambaTrainer
from anymamba.training.settings import Settings
from tests.support.training import TEXT, small

pytestmark = pytest.mark.slow


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_metrics(folder / "run" / "metrics.jsonl") if key in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return MambaForCausalLM.from_pretrained(folder / "run").state_dict()


def trainer_of(settings: Settings) -> MambaTrainer:
    tokenizer = open_tokenizer("byte", [], 0)
    torch.manual_seed(0)
    model = new_model(settings, tokenizer)
    row = tokenize(held_out([TEXT], 0.1)[0], tokenizer)
    return MambaTrainer(model, settings, row, tokenizer=tokenizer)


def test_decay_is_on_matrices_only(tmp_path: Path) -> None:
    trainer = trainer_of(small(tmp_path, decay_embeddings=False))
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    decaying, free = trainer.create_optimizer().param_groups
    assert decaying["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    assert decaying["betas"] == (0.9, 0.95)
    kinds = {names[id(weight)].split("mixer.")[-1] for weight in decaying["params"]}
    assert kinds == {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}
    assert len(decaying["params"]) + len(free["params"]) == len(names)


def test_a_step_is_adamw_written_out(tmp_path: Path) -> None:
    """Two accumulated batches against one, with the update rule of the AdamW paper by hand."""
    settings = small(tmp_path, steps=1, warm_up=0.0, batch=2, accumulation=2, gradient_clip=0.5)
    trainer = trainer_of(settings)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    model = new_model(settings, open_tokenizer("byte", [], 0))
    model.load_state_dict(trainer.model.state_dict())
    rows = [trainer.train_dataset[number] for number in range(4)]
    logits = model(torch.stack([row["input_ids"] for row in rows])).logits
    targets = torch.stack([row["shift_labels"] for row in rows])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values() if g is not None))
    trainer.train()
    assert trainer.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    for name, weight in trainer.model.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        gradient = gradient * min(1.0, 0.5 / float(norm))
        decay = 0.1 if weight.ndim == 2 and "A_log" not in name else 0.0
        wanted = before[name] * (1 - 3e-3 * decay) - 3e-3 * gradient / (gradient.abs() + 1e-8)
        # The first step is the gradient's sign, which tiny gradients leave to rounding.
        certain = gradient.abs() > 1e-6
        assert torch.allclose(weight[certain], wanted[certain], rtol=0, atol=1e-5), name


def test_carried_states_are_those_of_the_whole_text(tmp_path: Path) -> None:
    """The logits of windows one after the other, against one pass over the whole stream."""
    settings = small(tmp_path, order="carried", batch=2, steps=5, dropout=0.0, learning_rate=0.0,
                     final_learning_rate=0.0)  # fmt: skip
    trainer = trainer_of(settings)
    given: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    compute = trainer.compute_loss

    def spy(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = compute(model, inputs, return_outputs=True, **kwargs)
        given.append(inputs["input_ids"])
        made.append(outputs.logits.detach())
        return loss

    trainer.compute_loss = spy  # type: ignore[method-assign]
    trainer.train()
    with torch.no_grad():
        whole = trainer.model.eval()(torch.cat(given, 1)).logits
    assert torch.cat(given, 1).shape == (2, 160)
    # float32: the bound for a model that is cut in pieces.
    assert torch.allclose(torch.cat(made, 1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["random", "shuffled", "carried"])
def test_the_loss_falls(order: str, tmp_path: Path) -> None:
    outcome = train(small(tmp_path, order=order, steps=40, learning_rate=2e-2))
    seen = losses(tmp_path)
    assert len(seen) == 40
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    assert outcome.figures["validation_loss_windows"] < seen[0]


@pytest.mark.parametrize(
    ("architecture", "sizes"), [("falcon_mamba", {}), ("mamba2", {"head_dim": 8, "groups": 2})]
)
def test_every_architecture_learns(
    architecture: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    """With its state carried on from batch to batch."""
    given = {"architecture": architecture, "order": "carried", **sizes}
    settings = small(tmp_path, **given, steps=24, learning_rate=1e-2)
    train(settings)
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.3
    result = load_causal_lm(tmp_path / "run")
    assert result.config.model_type == architecture
    if architecture == "mamba2":
        fields = (result.config.num_heads, result.config.head_dim, result.config.n_groups)
        assert fields == (4, 8, 2)


def test_dropout_leaves_no_trace(tmp_path: Path) -> None:
    """It changes training and nothing else: Transformers' class reads and agrees."""
    train(small(tmp_path, dropout=0.3, embedding_dropout=0.1, store="bfloat16"))
    dropped = losses(tmp_path)
    found = MambaForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    theirs, report = TransformersMamba.from_pretrained(
        tmp_path / "run", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert not any("dropout" in name for name in config)
    assert (config["dtype"], config["use_cache"]) == ("bfloat16", True)
    ids = torch.tensor([list(b"7 times 7")])
    with torch.no_grad():
        assert torch.equal(found(ids).logits, found(ids).logits)
        assert torch.allclose(found(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-4)
    train(small(tmp_path), overwrite=True)
    assert losses(tmp_path) != dropped


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    train(small(tmp_path, steps=4, dropout=0.2))
    plain = losses(tmp_path)
    train(small(tmp_path, steps=4, dropout=0.2, gradient_checkpointing=True), overwrite=True)
    # The same numbers are computed twice, with the same dropout.
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-6)


def test_bfloat16_autocast_is_near_float32(tmp_path: Path) -> None:
    train(small(tmp_path, steps=4))
    plain = losses(tmp_path)
    train(small(tmp_path, steps=4, dtype="bfloat16"), overwrite=True)
    assert losses(tmp_path) != plain
    assert losses(tmp_path) == pytest.approx(plain, rel=2e-2)  # the design's bound for bfloat16


def test_it_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    settings = small(tmp_path, steps=100, evaluate_every=2, patience=2, learning_rate=0.0,
                     final_learning_rate=0.0)  # fmt: skip
    assert train(settings).figures["steps"] == 6


def test_the_clock_ends_it(tmp_path: Path) -> None:
    outcome = train(small(tmp_path, steps=None, minutes=0.02))
    rates = losses(tmp_path, "learning_rate")
    assert outcome.figures["seconds"] >= 1.2
    assert rates[-1] == pytest.approx(3e-5, rel=0.2)


def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    settings = small(tmp_path, steps=10)
    trainer = trainer_of(settings)
    step = trainer.compute_loss

    def broken(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return step(model, inputs, **kwargs) * (
            float("nan") if trainer.state.global_step == 7 else 1
        )

    trainer.compute_loss = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss became nan in step 8"):
        trainer.train()


def test_what_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    train(small(tmp_path, steps=2))
    with pytest.raises(InputError, match="has a run in it"):
        train(small(tmp_path, steps=2))
    with pytest.raises(ConfigError, match="there is no budget"):
        train(small(tmp_path, steps=None))


def test_it_goes_on_from_a_model(tmp_path: Path) -> None:
    train(small(tmp_path, steps=30, learning_rate=2e-2))
    begin = small(tmp_path, steps=1, model=str(tmp_path / "run"), output=str(tmp_path / "more"))
    outcome = train(begin)
    first = read_metrics(outcome.folder / "metrics.jsonl")[0]["loss"]
    assert first < losses(tmp_path)[0] - 0.5


def test_samples_leave_the_random_numbers_alone(tmp_path: Path) -> None:
    train(small(tmp_path, dropout=0.1))
    silent = losses(tmp_path)
    train(small(tmp_path, dropout=0.1, sample_prompt="7", sample_tokens=5), overwrite=True)
    assert losses(tmp_path) == silent
    assert len(losses(tmp_path, "sample")) == 2


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert train(small(tmp_path, steps=2, plot=True)).figures["picture"]
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_tensorboard_gets_the_metrics_of_the_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small(tmp_path, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert len(expected) == 12
    assert written == pytest.approx(expected)
    assert [event.step for event in events.Scalars("eval/loss")] == [6, 12]
