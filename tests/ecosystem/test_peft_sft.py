"""LoRA through PEFT, trained with TRL's SFTTrainer: the whole round, on a small text set."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from anymamba import MambaForCausalLM

pytestmark = pytest.mark.slow

TARGETS = ["x_proj", "embeddings", "in_proj", "out_proj"]
STEPS = 12


class SeesGradients(TrainerCallback):
    """Notes which parameters ever had a gradient that is not zero.

    Over several steps: a LoRA pair starts with B = 0, so A has none at the first.
    """

    def __init__(self) -> None:
        self.trained: set[str] = set()

    def on_pre_optimizer_step(
        self, args: object, state: object, control: object, **kwargs: object
    ) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None and bool(parameter.grad.abs().sum() > 0):
                self.trained.add(name)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20) * 6
    return model.eval()(ids).logits


def same(found: torch.Tensor, reference: torch.Tensor) -> bool:
    """Equal up to the order of float32 products; the design's bound for whole models."""
    bound = 1e-4 * max(1.0, float(reference.abs().max()))
    return torch.allclose(found, reference, rtol=0, atol=bound)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_train_save_reload_and_merge(
    checkpoint: Path, tmp_path: Path, registered: None, texts: list[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = logits(model)
    sees_gradients = SeesGradients()
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            max_length=64,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            seed=0,
        ),
        peft_config=LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[sees_gradients],
    )
    trainer.train()

    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    # Random weights start far above a uniform guess; a third less is no accident of one batch.
    assert sum(losses[-3:]) < 2 / 3 * sum(losses[:3])

    tuned = trainer.model
    factors = {name for name, p in tuned.named_parameters() if "lora_" in name}
    # Two factors for each of three projections in two layers, and for the embeddings.
    assert len(factors) == 2 * (3 * 2 + 1)
    assert sees_gradients.trained == factors

    unmerged = logits(tuned)
    assert not same(unmerged, before)
    trainer.save_model(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert same(logits(reloaded), unmerged)
    merged = reloaded.merge_and_unload()
    assert type(merged) is MambaForCausalLM
    assert same(logits(merged), unmerged)
    merged.save_pretrained(tmp_path / "merged")
    assert same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), unmerged)
