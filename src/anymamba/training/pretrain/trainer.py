"""Transformers' Trainer for Mamba: the paper's recipe, with states that are carried on.

What it adds to its parent: which weights decay, a learning rate that follows steps or the clock,
losses of rows whose targets come along, states that go from one batch to the next, and evaluation
in windows.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from anymamba.modeling import MambaCache, MambaForCausalLM
from anymamba.training.data import Rows, TokenRow, collate
from anymamba.training.lifecycle import Progress, RunTrainer, check_resumable
from anymamba.training.pretrain.arguments import rate_at, training_arguments
from anymamba.training.pretrain.validation import loss_of_windows, summed_loss
from anymamba.training.settings import Settings


class MambaTrainer(RunTrainer):
    """Trains a Mamba language model on rows of tokens.

    Args:
        model: what to train.
        settings: how.
        train: the documents.
        validation: documents held out, or None.
        tokenizer: stored with each checkpoint.
        folder: where `checkpoints/` is; by default the settings' output.
        callbacks: further ones of Transformers.

    Attributes:
        progress: the run's past, over all interruptions.
        share_spent: how much of the budget is used up; 1 is all.
        stopped: whether a signal asked for an end.
        gradient_norm: of the last step, before clipping.

    Raises:
        InputError: the documents are too short.
        TrainingError (from `train`): as `RunTrainer`.
    """

    def __init__(
        self,
        model: MambaForCausalLM,
        settings: Settings,
        train: TokenRow,
        validation: TokenRow | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        folder: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.settings = settings
        self.validation = validation
        self.checkpoints = (folder or Path(settings.output)) / "checkpoints"
        self.keep_checkpoints = settings.keep_checkpoints
        self.progress = Progress(text=zlib.crc32(train.tokens.tobytes()))
        self.gradient_norm = 0.0
        self.share_spent = 0.0
        self.stopped = False
        self._tokenizer = tokenizer
        self._cache: MambaCache | None = None
        arguments = training_arguments(settings, self.checkpoints)
        a_batch = settings.batch * arguments.world_size
        rows = Rows(
            train,
            settings.window,
            settings.order,
            streams=a_batch,
            count=a_batch * settings.accumulation * arguments.max_steps,
            seed=settings.seed,
        )
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    @property
    def mamba(self) -> MambaForCausalLM:
        """The model itself, without what distributes or compiles it."""
        found = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        assert isinstance(found, MambaForCausalLM)
        return found

    # The recipe.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW that decays matrices only."""
        if self.optimizer is None:
            groups: dict[bool, list[Tensor]] = {True: [], False: []}
            for name, weight in (model or self.mamba).named_parameters():
                if weight.requires_grad:
                    groups[decays(name, weight, self.settings.decay_embeddings)].append(weight)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": groups[True], "weight_decay": self.settings.weight_decay},
                    {"params": groups[False], "weight_decay": 0.0},
                ],
                lr=self.settings.learning_rate,
                betas=(self.settings.beta1, self.settings.beta2),
                fused=True,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """The learning rate by the share of the budget that is spent."""
        if self.lr_scheduler is None:
            highest = self.settings.learning_rate
            self.lr_scheduler = LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: rate_at(self.settings, self._share_after(step)) / (highest or 1.0),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _share_after(self, step: int) -> float:
        """How much of the steps, or of the minutes, is used up after `step` steps; 1 is all."""
        if self.settings.minutes is None:
            self.share_spent = step / (self.settings.steps or math.inf)
        else:
            share = self.progress.tick() / max(60 * self.settings.minutes, 1e-9)
            # All processes go by one clock: another learning rate would be another model.
            on_all = torch.tensor(share, device=self.args.device)
            self.share_spent = float(broadcast(on_all))
        return self.share_spent

    # A step.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of the step's predictions, of which this batch has a share."""
        targets = inputs["shift_labels"]
        given: dict[str, Any] = {"input_ids": inputs["input_ids"], "use_cache": False}
        if "seq_idx" in inputs:
            given["seq_idx"] = inputs["seq_idx"]
        if self.settings.order == "carried":
            given |= {"cache": self._carried_state(inputs["begins"]), "use_cache": True}
        outputs = model(**given)
        loss = summed_loss(outputs.logits, targets)
        loss = loss / (
            (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP takes the mean over processes, of what is a share of the sum here.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _carried_state(self, begins_b: Tensor) -> MambaCache:
        """The state after the batch before this one, emptied where a row's text begins."""
        if self._cache is None:
            self._cache = self._empty_state(begins_b.shape[0])
        self._cache.conv_states[:, begins_b] = 0
        self._cache.ssm_states[:, begins_b] = 0
        return self._cache

    def _empty_state(self, rows: int) -> MambaCache:
        return MambaCache.for_model(self.mamba, rows, device=self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch, whose loss is noted."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.progress.loss_sum += float(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.gradient_norm = float(norm)
        return norm

    def over_processes(self, numbers: list[float], how: str = "sum") -> list[float]:
        """Numbers of each process, added up or averaged over all; every process calls this.

        Args:
            numbers: this process's.
            how: "sum" or "mean".
        """
        # One process waits for no device, and MPS, which has no float64, is for one alone.
        if self.accelerator.num_processes == 1:
            return numbers
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        found: list[float] = self.accelerator.reduce(mine, how).tolist()
        return found

    # Evaluation.

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss on the text held out, in windows side by side, each from an empty state.

        Returns:
            `eval_loss` in nats per token; empty where nothing is held out.
        """
        row = self.validation if eval_dataset is None else eval_dataset
        if row is None or len(row) < 2:
            return {}
        model = self.mamba
        training = model.training
        model.eval()
        loss = loss_of_windows(
            model,
            row,
            self.settings.evaluation_window or self.settings.window,
            most=self.settings.evaluate_windows,
            batch=self.settings.batch,
            share=(self.args.process_index, self.args.world_size),
        )
        model.train(training)
        total, count = self.over_processes([loss.total, loss.count])
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell all who listen; without the epoch, which our endless row of rows has not."""
        self.state.epoch = None  # type: ignore[assignment]
        super().log(logs, start_time)

    # Checkpoints.

    def add_to_checkpoint(self, folder: Path) -> None:
        """Write the carried states of each process, and what the run knows of its past."""
        if self._cache is not None:
            states = {"conv": self._cache.conv_states, "ssm": self._cache.ssm_states}
            save_file(states, folder / self._state_file)
        if self.args.should_save:
            self.progress.tick()
            self.progress.save(folder)
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(folder)

    @property
    def _state_file(self) -> str:
        return f"carried-{self.args.process_index}.safetensors"

    def check_checkpoint(self, folder: Path) -> None:
        """Refuse to go on from a checkpoint that is damaged or of another run; change nothing.

        Raises:
            TrainingError: it is.
        """
        rows = self.settings.batch if self.settings.order == "carried" else None
        check_resumable(folder, self.mamba, self.progress.text, rows)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.check_checkpoint(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.progress = Progress.load(folder)
        if self.settings.order == "carried" and (folder / self._state_file).is_file():
            blocks = load_file(folder / self._state_file)
            cache = self._empty_state(self.settings.batch)
            cache.conv_states.copy_(blocks["conv"])
            cache.ssm_states.copy_(blocks["ssm"])
            self._cache = cache


def decays(name: str, weight: Tensor, embeddings: bool = True) -> bool:
    """Whether weight decay applies: to the matrices of projections, and to embeddings if asked.

    A_log and D set time constants and biases set offsets: pulled to zero they would mean another
    thing, not less. Norms' gains and the convolutions' few taps keep their size, too.

    Example:
        >>> decays("layers.0.mixer.A_log", torch.ones(2, 2))
        False

    Source: Gu and Dao, 2023, appendix E.2; the original code marks A_log, D and the step's bias.
    """
    if weight.ndim != 2 or name.endswith("A_log"):
        return False
    return embeddings or not name.endswith(("embeddings.weight", "lm_head.weight"))
