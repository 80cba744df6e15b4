"""Transformers' `Trainer` on an AnyMamba model."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from anymamba import MambaForCausalLM

pytestmark = pytest.mark.slow


def arguments(folder: Path, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
        **settings,
    )


def dataset(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Dataset:
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return Dataset.from_dict({"input_ids": rows})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_the_loss_falls_and_what_was_trained_is_saved(
    checkpoint: Path, tmp_path: Path, texts: list[str], checkpointing: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = Trainer(
        model=MambaForCausalLM.from_pretrained(checkpoint),
        args=arguments(tmp_path, max_steps=12, gradient_checkpointing=checkpointing),
        train_dataset=dataset(tokenizer, texts),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 2 / 3 * sum(losses[:3])
    trainer.save_model(tmp_path / "trained")
    loaded = MambaForCausalLM.from_pretrained(tmp_path / "trained")
    for (name, saved), tensor in zip(
        loaded.state_dict().items(), trainer.model.state_dict().values(), strict=True
    ):
        assert torch.equal(saved, tensor), name


def test_accumulated_steps_are_one_step_of_the_whole(
    checkpoint: Path, tmp_path: Path, texts: list[str]
) -> None:
    """`num_items_in_batch`: texts of different lengths, so a mean of means would differ."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trained = []
    for batch, accumulated in ((8, 1), (2, 4)):
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=accumulated)
        args.per_device_train_batch_size = batch
        args.optim = "sgd"
        trainer = Trainer(
            model=MambaForCausalLM.from_pretrained(checkpoint),
            args=args,
            train_dataset=dataset(tokenizer, texts),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        trained.append(trainer.model.state_dict())
    whole, in_parts = trained
    for name, tensor in whole.items():
        # The same float32 sums in another order; weights are of order 1.
        assert torch.allclose(tensor, in_parts[name], rtol=0, atol=1e-5), name


def test_evaluation_gives_the_loss_of_transformers(
    checkpoint: Path, tmp_path: Path, texts: list[str], transformers_model: torch.nn.Module
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    losses = []
    for model in (MambaForCausalLM.from_pretrained(checkpoint), transformers_model):
        # One text a batch: Transformers' Mamba lets padding into the state.
        args = arguments(tmp_path, per_device_eval_batch_size=1)
        trainer = Trainer(
            model=model,
            args=args,
            eval_dataset=dataset(tokenizer, texts),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        losses.append(trainer.evaluate()["eval_loss"])
    ours, theirs = losses
    assert ours == pytest.approx(theirs, rel=1e-5)  # float32
