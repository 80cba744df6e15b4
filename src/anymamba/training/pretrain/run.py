"""A training run from its settings to a folder with a model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from anymamba.checkpoint.io import move_into_place, user_path
from anymamba.errors import ConfigError, InputError
from anymamba.modeling import MambaForCausalLM, load_causal_lm
from anymamba.modeling.auto import CLASSES, new_causal_lm
from anymamba.renamed import old_names
from anymamba.training.data import TokenRow, open_tokenizer, texts_of, tokenize
from anymamba.training.lifecycle import (
    CANNOT_WRITE,
    PARTIAL,
    ConsoleReport,
    MetricsFile,
    StopSignals,
    check_same_settings,
    draw_losses,
    last_checkpoint,
    not_written,
    publish,
    read_metrics,
    tensorboard_callback,
)
from anymamba.training.load_trainable import open_trainable
from anymamba.training.pretrain.dropout import residual_dropout
from anymamba.training.pretrain.trainer import MambaTrainer
from anymamba.training.pretrain.validation import loss_of_stream, loss_of_windows
from anymamba.training.settings import Settings, settings_from

CONFIG_FILE = "training.yaml"
RESULT_FILE = "training.json"
METRICS_FILE = "metrics.jsonl"
BEST = "best"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        folder: where everything is.
        figures: what is known of it, as `training.json` has it.
        stopped_by: the signal that ended it before its time, or None.
        first: whether this is the first of a launcher's processes, or the only one.
    """

    folder: Path
    figures: dict[str, Any]
    stopped_by: signal.Signals | None = None
    first: bool = True


def train(
    settings: Settings, *, resume: bool = False, overwrite: bool = False, visible: bool = False
) -> RunResult:
    """Train a model and store it, with its tokenizer, its settings and its history.

    Args:
        settings: everything that decides the result.
        resume: go on from the last checkpoint in the output folder, if there is one.
        overwrite: replace what an earlier run left there.
        visible: whether to tell on standard error how it goes.

    Returns:
        How it ended. After SIGTERM or Ctrl-C a checkpoint is there, and no result.

    Raises:
        ConfigError: neither steps nor minutes are given, or the model does not fit the settings.
        InputError: there is too little text, or it cannot be read.
        TrainingError: a run that goes on is given settings that contradict those that it began
            with; the loss is no number any more, or a disk is full. The last checkpoint is as it
            was.
    """
    if settings.steps is None and settings.minutes is None:
        raise ConfigError("there is no budget: give steps or minutes")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = user_path(settings.output, InputError)
    check_folder(folder, settings.output, resume or overwrite)
    checkpoints = folder / "checkpoints"
    begun = last_checkpoint(checkpoints) if resume else None
    if begun is not None and (kept := folder / CONFIG_FILE).is_file():
        check_same_settings(settings_from(kept), settings)
    texts = texts_of(settings)
    tokenizer = open_tokenizer(settings.tokenizer, texts[0], settings.vocab_size)
    row, held_out = (tokenize(part, tokenizer, settings.end_of_text) for part in texts)
    validation = held_out if len(held_out) > 1 else None
    set_seed(settings.seed)
    model = new_model(settings, tokenizer)
    # All that could be refused was read by now: only then is anything written or removed.
    with writing_into(settings.output):
        trainer = MambaTrainer(model, settings, row, validation, tokenizer, folder)
        if begun is not None:
            trainer.check_checkpoint(begun)
        if trainer.is_world_process_zero():
            prepare_folder(folder, settings, resume)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        add_callbacks(trainer, stop, stack, begun, visible)
        stack.enter_context(residual_dropout(model, settings.dropout, settings.embedding_dropout))
        trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
    if trainer.stopped and trainer.share_spent < 1:
        figures = {"steps": trainer.progress.step}
        received = stop.received or signal.SIGTERM
        return RunResult(folder, figures, received, trainer.is_world_process_zero())
    return finish(trainer, tokenizer, validation, folder)


def check_folder(folder: Path, named: str, may_exist: bool) -> None:
    """Refuse an output folder that cannot be written into, or has a run in it that may not be
    there, before the work that would go into it."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write into {named!r}: {str(existing)!r} is not a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"cannot write into {named!r}: you may not write to {str(existing)!r}")
    if may_exist or int(os.environ.get("RANK", "0")):
        return  # the first process of a launcher's decides for all
    if any((folder / name).exists() for name in ("checkpoints", "config.json", METRICS_FILE)):
        raise InputError(
            f"the folder {named!r} has a run in it: go on with --resume, replace it with "
            "--overwrite, or name another with --output"
        )


@contextmanager
def writing_into(named: str) -> Iterator[None]:
    """Say which folder could not be written into, where a file could not be made."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write into {named!r}: {error.strerror or error}") from None


def prepare_folder(folder: Path, settings: Settings, resume: bool) -> None:
    """Write the settings into the output folder, empty unless a run is to go on."""
    checkpoints = folder / "checkpoints"
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (folder / METRICS_FILE).unlink(missing_ok=True)
    # What a killed process was writing.
    for unfinished in checkpoints.glob(f"{PARTIAL}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> MambaForCausalLM:
    """A model with random weights, or the one to go on from, in float32."""
    if settings.model is not None:
        found = open_trainable(settings.model)
        if found.config.vocab_size < len(tokenizer):
            raise ConfigError(
                f"the model {settings.model!r} knows {found.config.vocab_size} tokens, and the "
                f"tokenizer has {len(tokenizer)}: name its own with --tokenizer"
            )
        return found
    end = tokenizer.eos_token_id
    new: Any = CLASSES[settings.architecture].config
    config = new(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        state_size=settings.state_size,
        expand=settings.expand,
        conv_kernel=settings.conv_kernel,
        **settings.heads,
        tie_word_embeddings=settings.tie_embeddings,
        initializer_range=settings.initializer_range,
        rescale_prenorm_residual=settings.rescale_residual,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = new_causal_lm(config)
    # Transformers' class draws out_proj anew when it loads a model whose config asks for this.
    model.config.rescale_prenorm_residual = False
    return model


def add_callbacks(
    trainer: MambaTrainer, stop: StopSignals, stack: ExitStack, begun: Path | None, visible: bool
) -> None:
    """Who listens to a run. The course of events is decided first, reports follow."""
    folder = trainer.checkpoints.parent
    trainer.add_callback(RunCallback(trainer, stop))
    if trainer.is_world_process_zero():
        after = 0 if begun is None else int(begun.name.split("-")[1])
        trainer.add_callback(MetricsFile(folder / METRICS_FILE, after, trainer.checkpoints))
        if trainer.settings.tensorboard and (board := tensorboard_callback(folder / "tensorboard")):
            trainer.add_callback(board)
        if visible:
            trainer.add_callback(stack.enter_context(ConsoleReport(trainer)))


class RunCallback(TrainerCallback):
    """When to log, evaluate, save and stop, and what to keep.

    Args:
        trainer: whose run.
        stop: asked after each step.
    """

    def __init__(self, trainer: MambaTrainer, stop: StopSignals) -> None:
        self._trainer, self._stop = trainer, stop
        self._since = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        progress = self._trainer.progress
        progress.start()
        self._since = (progress.seconds, progress.tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide."""
        trainer, progress, settings = self._trainer, self._trainer.progress, self._trainer.settings
        progress.step = state.global_step
        progress.loss_count += 1
        progress.tokens += (
            settings.batch * settings.accumulation * settings.window * args.world_size
        )
        if state.global_step % settings.log_every == 0:
            self._log()
        over = trainer.share_spent >= 1
        trainer.stopped = self._asked_to_stop()
        control.should_training_stop = over or trainer.stopped
        control.should_evaluate = trainer.validation is not None and (
            over or state.global_step % settings.evaluate_every == 0
        )
        control.should_save = (
            control.should_training_stop or state.global_step % settings.save_every == 0
        )

    def _asked_to_stop(self) -> bool:
        """Whether any of the processes got a signal: all of them stop after the same step."""
        (asked,) = self._trainer.over_processes([float(self._stop.received is not None)])
        return asked > 0

    def _log(self) -> None:
        trainer, progress = self._trainer, self._trainer.progress
        assert trainer.lr_scheduler is not None
        (total,) = trainer.over_processes([progress.loss_sum], "mean")
        loss = total / progress.loss_count
        progress.loss_sum, progress.loss_count = 0.0, 0
        seconds, tokens = self._since
        self._since = (progress.tick(), progress.tokens)
        trainer.log(
            {
                "loss": loss,
                "learning_rate": float(trainer.lr_scheduler.get_last_lr()[0]),
                "gradient_norm": trainer.gradient_norm,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
                "tokens_per_second": round(
                    (progress.tokens - tokens) / max(progress.seconds - seconds, 1e-9), 1
                ),
            }
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights if they are the best; stop if they have long not been."""
        trainer, settings = self._trainer, self._trainer.settings
        if trainer.progress.note_loss(kwargs["metrics"]["eval_loss"], state.global_step):
            if state.is_world_process_zero and settings.keep == "best":
                store(trainer.mamba, trainer.checkpoints / BEST, "float32", trainer.checkpoints)
        elif settings.patience and trainer.progress.without_better >= settings.patience:
            control.should_training_stop = control.should_save = True
        if settings.sample_prompt is not None and state.is_world_process_zero:
            text = sample(trainer, settings.sample_prompt, settings.sample_tokens)
            trainer.log({"sample": text})  # type: ignore[dict-item]


def sample(trainer: MambaTrainer, prompt: str, length: int) -> str:
    """How the model goes on from a prompt. Training's own random numbers are left alone."""
    tokenizer = trainer._tokenizer
    assert tokenizer is not None
    model = trainer.mamba
    training = model.training
    model.eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    # PyTorch would save the generators of all GPUs, and warn that there are many.
    gpus = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.inference_mode():
        torch.manual_seed(trainer.settings.seed)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=True,
            temperature=0.8,
            top_k=0,
        )
    model.train(training)
    return str(tokenizer.decode(tokens[0]))


def store(model: Any, target: Path, dtype: str, checkpoints: Path, tokenizer: Any = None) -> None:
    """Write a model folder, whole or not at all."""
    partial = target.with_name(f"{PARTIAL}-{target.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if dtype == "bfloat16":
            model = copy.deepcopy(model).to(torch.bfloat16)
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        publish(partial, target)
    except CANNOT_WRITE as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise not_written(str(target), error, checkpoints) from error


def finish(
    trainer: MambaTrainer,
    tokenizer: PreTrainedTokenizerBase,
    validation: TokenRow | None,
    folder: Path,
) -> RunResult:
    """Put the result in its place, measure what was stored, and write down how it came about."""
    settings, progress = trainer.settings, trainer.progress
    figures: dict[str, Any] = {
        "parameters": trainer.mamba.num_parameters(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if not trainer.is_world_process_zero():
        return RunResult(folder, figures, first=False)
    best = trainer.checkpoints / BEST
    model = trainer.mamba
    if settings.keep == "best" and best.is_dir() and progress.best_step:
        model = load_causal_lm(best)
        figures["best_step"] = progress.best_step
    result = trainer.checkpoints / "result"
    store(model, result, settings.store, trainer.checkpoints, tokenizer)
    for file in result.iterdir():
        move_into_place(file, folder / file.name)
    result.rmdir()
    if validation is not None:
        figures |= measure(folder, validation, settings, trainer.args.device)
    lines = read_metrics(folder / METRICS_FILE)
    if settings.plot:
        figures["picture"] = draw_losses(lines, folder / "loss.png")
    content = {"settings": asdict(settings), "result": figures, "curve": curve(lines)}
    text = json.dumps(content, indent=1) + "\n"
    (folder / RESULT_FILE).write_text(text, encoding="utf-8")
    return RunResult(folder, figures)


def measure(
    folder: Path, validation: TokenRow, settings: Settings, device: torch.device
) -> dict[str, float]:
    """The losses of what was stored, computed in float32."""
    stored: Any = load_causal_lm(folder, dtype=torch.float32).eval().to(device)
    window = settings.evaluation_window or settings.window
    return {
        "validation_tokens": len(validation),
        "validation_loss_windows": loss_of_windows(stored, validation, window).mean,
        "validation_loss_stream": loss_of_stream(stored, validation).mean,
    }


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations, each with the training loss before it."""
    points: list[dict[str, Any]] = []
    last: dict[str, Any] = {"seconds": None, "loss": None}
    for line in lines:
        last |= {name: line[name] for name in last if name in line}
        if "eval_loss" in line:
            points.append({"step": line["step"], **last, "validation_loss": line["eval_loss"]})
    return points


__getattr__ = old_names(__name__)
