"""Training a model further: an adapter of it (LoRA, DoRA), or all of its weights.

TRL's `SFTTrainer` trains, PEFT makes the adapter and writes it. Of a prompt with its answer only
the answer counts for the loss.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from anymamba.assets import bundled_model
from anymamba.checkpoint import resolve
from anymamba.checkpoint.atomic_folder import check_apart, check_destination, write_folder
from anymamba.checkpoint.io import user_path
from anymamba.errors import InputError
from anymamba.modeling import MambaForCausalLM
from anymamba.modeling.adapters import patch_peft
from anymamba.training.data import (
    DEFAULT_TEMPLATE,
    Example,
    dataset_examples,
    is_conversation,
    read_examples,
    stored_tokenizer,
)
from anymamba.training.finetune.checkpoints import facts_of, place_beside, resumable
from anymamba.training.finetune.settings import LEARNING_RATES, FinetuneSettings
from anymamba.training.lifecycle import StopSignals
from anymamba.training.load_trainable import open_trainable


def finetune(
    data: Sequence[str],
    destination: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    settings: FinetuneSettings | None = None,
    *,
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    validation: Sequence[str] = (),
    save_every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    offline: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Train a model further and write the adapter, or the model, in one step.

    SIGTERM and Ctrl-C end training after the step that is under way; what was learned until then
    is written.

    Args:
        data: files of examples; `read_examples` says which. None where a dataset is given.
        destination: the folder to write: an adapter in PEFT's format, or for the method "full" a
            model; with the tokenizer, its chat template, and the tokens that end an answer.
        model: a folder or a hub id; None for the bundled model.
        settings: how to train.
        dataset, dataset_config, dataset_split: a Hugging Face dataset in place of files, as for
            `dataset_examples`.
        validation: files of examples to tell the loss on, before and after.
        save_every: steps between checkpoints, which lie beside the destination, in a folder of its
            name and `.checkpoints`, until all is done; None for no checkpoints.
        resume: go on from the last of them.
        overwrite: replace what is there.
        offline: use what was downloaded of a hub id before, and no network.
        progress: told how many steps are done, and of how many.

    Returns:
        `destination`, `examples`, `steps`, `seconds`, `parameters`, `trained_parameters`,
        `loss_first`, `loss_last`, and `stopped_by`: "end" or a signal's name; with `validation`
        also `validation_before` and `validation_after`, in nats a token of the answers.

    Raises:
        InputError: there are both files and a dataset, or neither; the data make no examples, or
            the chat template refuses them; there is no checkpoint to go on from, or one of
            another run.
        CheckpointError: the model cannot be read, or the destination not be written.
        ConfigError: the model's weights are kept in 8 or 4 bits.
        TrainingError: the loss became NaN or infinite, and no result is written; or a checkpoint
            is of another run, or cannot be written.

    Example:
        >>> file = Path(tempfile.mkdtemp()) / "sums.jsonl"
        >>> _ = file.write_text('{"prompt": "1+1=", "completion": "2"}\\n' * 4)
        >>> settings = FinetuneSettings(rank=2, max_steps=1)
        >>> finetune([str(file)], file.parent / "adapter", settings=settings)["steps"]
        1
    """
    settings = settings or FinetuneSettings()
    if bool(data) == (dataset is not None):
        raise InputError("give either files of examples (DATA), or a dataset (--dataset NAME)")
    named = bundled_model() if model is None else model
    check_apart(named, destination)
    target = check_destination(destination, overwrite)
    checkpoints = place_beside(target, resume, overwrite)
    if dataset is None:
        examples = read_examples(data, settings.text_field)
    else:
        place = (dataset, dataset_config, dataset_split)
        examples = dataset_examples(*place, settings.text_field)
    held_out = read_examples(validation, settings.text_field) if validation else None
    folder = resolve(named, offline=offline)
    tokenizer = stored_tokenizer(folder)
    base = open_trainable(folder)
    # What an adapter says it belongs to: the hub's name and not the place of a download.
    local = user_path(named)
    base.name_or_path = str(local.resolve()) if local.is_dir() else str(named)
    ends = _prepare(tokenizer, base, settings.chat_template, is_conversation(examples[0]))
    facts = facts_of(settings, base.name_or_path, examples)
    begun = resumable(checkpoints, facts) if resume else None
    undo = patch_peft()
    try:
        with tempfile.TemporaryDirectory() as scratch, StopSignals() as signals:
            callback = FinetuneCallback(signals, progress, saves=bool(save_every))
            trainer = _trainer(
                base, tokenizer, settings, scratch, examples, held_out, callback,
                save_every, checkpoints=checkpoints, facts=facts,
            )  # fmt: skip
            if begun is None:
                shutil.rmtree(checkpoints, ignore_errors=True)
            figures = _train(trainer, signals, held_out is not None, begun)
        base.generation_config.eos_token_id = ends  # the trainer leaves the tokenizer's alone
        write_folder(target, lambda place: _save(trainer.model, base, tokenizer, place))
    finally:
        undo()
    if figures["stopped_by"] == "end":
        shutil.rmtree(checkpoints, ignore_errors=True)
    return {"destination": str(target), "examples": len(examples), **figures}


def _prepare(
    tokenizer: PreTrainedTokenizerBase, model: MambaForCausalLM, template: str | None, chat: bool
) -> list[int]:
    """Give the tokenizer an end of text, padding, and a chat template; return what ends answers."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token is None:
        # The model's own end, else token 0, as Transformers has it for a Mamba that says nothing.
        token = tokenizer.convert_ids_to_tokens((ends or [0])[0])
        tokenizer.add_special_tokens({"eos_token": token})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None or tokenizer.chat_template is None:
        tokenizer.chat_template = template or DEFAULT_TEMPLATE
    found = [tokenizer.eos_token_id, *ends]
    if chat:
        found += _ends_of_turn(tokenizer)
    return list(dict.fromkeys(found))


def _ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template writes after an answer, if it writes one."""
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "answered"}]
    with _template_errors():
        text = tokenizer.apply_chat_template(said, tokenize=False)
    _, found, rest = str(text).rpartition("answered")
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    return [id for id in ids[:1] if id in tokenizer.all_special_ids]


@contextmanager
def _template_errors() -> Iterator[None]:
    """Tell the user what a chat template refuses."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the chat template refuses the messages: {reason}") from error


def _trainer(
    model: MambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: FinetuneSettings,
    scratch: str,
    examples: list[Example],
    held_out: list[Example] | None,
    callback: TrainerCallback,
    save_every: int | None,
    **checkpointing: Any,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig

    from anymamba.training.finetune.trainer import FinetuneTrainer

    on_gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate or LEARNING_RATES[settings.method],
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # a share of all steps
        max_length=settings.max_length,
        packing=settings.packing,
        eval_packing=False,
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=not on_gpu,
        bf16=on_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        seed=settings.seed,
        save_strategy="no" if save_every is None else "steps",
        save_steps=save_every or 1,
        eval_strategy="no",
        report_to="none",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    with _template_errors():
        trainer = FinetuneTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(examples),
            eval_dataset=None if held_out is None else Dataset.from_list(held_out),
            peft_config=_adapter_config(settings),
            callbacks=[callback],
            **checkpointing,
        )
    trainer.remove_callback(PrinterCallback)
    datasets: list[Any] = [trainer.train_dataset, trainer.eval_dataset]
    for rows in datasets:
        if rows is not None and len(rows) == 0:
            raise InputError(
                "no example has anything to learn within its first "
                f"{settings.max_length} tokens: raise max_length (on the command line --max-length)"
            )
    return trainer


def _adapter_config(settings: FinetuneSettings) -> Any:
    from peft import LoraConfig

    if settings.method == "full":
        return None
    return LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        target_modules=list(settings.targets),
        lora_dropout=settings.adapter_dropout,
        use_rslora=settings.rslora,
        use_dora=settings.method == "dora",
        task_type="CAUSAL_LM",
    )


class FinetuneCallback(TrainerCallback):
    """Reports progress, and ends training on a signal.

    Args:
        signals: asked after each step.
        progress: told how many steps are done, and of how many.
        saves: whether the run keeps checkpoints.
    """

    def __init__(
        self, signals: StopSignals, progress: Callable[[int, int], object] | None, saves: bool
    ) -> None:
        self._signals, self._progress, self._saves = signals, progress, saves

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report, and look for a signal."""
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)
        if self._signals.received is not None:
            control.should_training_stop = True
            control.should_save = self._saves


def _train(
    trainer: Any, signals: StopSignals, validates: bool, begun: Path | None
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if validates:
        figures["validation_before"] = float(trainer.evaluate()["eval_loss"])
    start = time.perf_counter()
    steps = trainer.train(resume_from_checkpoint=None if begun is None else str(begun)).global_step
    figures |= {"steps": steps, "seconds": round(time.perf_counter() - start, 1)}
    if validates:
        figures["validation_after"] = float(trainer.evaluate()["eval_loss"])
    parameters = list(trainer.model.parameters())
    # Of all steps, those before a checkpoint too.
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return figures | {
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "stopped_by": "end" if signals.received is None else signals.received.name,
    }


def _save(
    model: Any, base: MambaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    try:
        if model is base:
            base.save_pretrained(folder)
        else:
            # The embedding table, which PEFT may add, is the model's and many times the adapter.
            model.save_pretrained(folder, save_embedding_layers=False)
            base.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, in the words of safetensors
        raise OSError(errno.ENOSPC, str(error).split("\n")[0]) from error
