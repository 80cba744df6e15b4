"""Train a small byte-level Mamba on one text file, on an ordinary CPU.

    python examples/shakespeare/train.py --data tinyshakespeare.txt --output my_model

The first 90 % of the bytes train, the last 10 % validate. The result is a folder that AnyMamba
and Transformers load: weights in bfloat16, configuration, tokenizer, `training.json` with the
recipe and the curve of losses, and a model card.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import save_byte_tokenizer
from model_card import write_model_card
from torch import Tensor
from transformers.utils import logging
from validation import loss_of_stream, loss_of_windows

from anymamba import MambaConfig, MambaForCausalLM


@dataclass(frozen=True)
class Recipe:
    """All that decides the result, apart from the data and the machine's speed."""

    hidden_size: int = 256
    layers: int = 7
    state_size: int = 8
    window: int = 256
    batch: int = 8
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-5
    warm_up: float = 0.03
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 1


@dataclass
class Record:
    """What happened during one training run."""

    steps: int = 0
    train_bytes_read: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    curve: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    """Train, then measure what was stored and describe it."""
    arguments = parse_arguments()
    recipe = Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())})
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(recipe.seed)
    train_text, validation_text = read_text(arguments.data)
    model = build_model(recipe)
    print(f"{model.num_parameters():,} parameters; {train_text.numel():,} bytes to learn from")

    record = Record()
    train(model, recipe, record, train_text, validation_text, arguments)
    finish(recipe, record, validation_text, arguments)


def parse_arguments() -> argparse.Namespace:
    """The command line: each field of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--minutes", type=float, default=8.0, help="processor time to spend")
    parser.add_argument("--steps", type=int, help="train so many steps instead of --minutes")
    parser.add_argument("--threads", type=int, default=1, help="threads for torch, default 1")
    parser.add_argument("--report-every", type=int, default=20, help="steps between lines")
    parser.add_argument(
        "--save-every", type=float, default=4.0, help="minutes from one saving to the next"
    )
    for name, value in asdict(Recipe()).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    return parser.parse_args()


def read_text(path: Path) -> tuple[Tensor, Tensor]:
    """The file's bytes as numbers, split into what trains and what validates."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    border = int(0.9 * data.numel())
    return data[:border], data[border:]


def build_model(recipe: Recipe) -> MambaForCausalLM:
    """A new model with random weights, for 256 tokens: the bytes."""
    config = MambaConfig(
        vocab_size=256,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        state_size=recipe.state_size,
        # As narrow as the original code draws embeddings.
        initializer_range=0.02,
        # Every byte is text, so none can mark a beginning, an end or padding.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return MambaForCausalLM(config)


def build_optimizer(model: MambaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: A_log, D, biases, norms and convolutions keep their size."""
    decaying: list[Tensor] = []
    free: list[Tensor] = []
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim == 2 and not name.endswith("A_log")
        (decaying if is_matrix else free).append(weight)
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def learning_rate(recipe: Recipe, progress: float) -> float:
    """A linear rise, then half a cosine down; `progress` goes from 0 to 1."""
    if progress < recipe.warm_up:
        return recipe.learning_rate * max(progress / recipe.warm_up, 0.01)
    descent = (progress - recipe.warm_up) / (1.0 - recipe.warm_up)
    share = 0.5 * (1.0 + math.cos(math.pi * min(descent, 1.0)))
    return recipe.final_learning_rate + share * (recipe.learning_rate - recipe.final_learning_rate)


def draw_batch(text: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Windows from random places; one byte longer, because labels are the inputs shifted."""
    length = recipe.window + 1
    starts = torch.randint(text.numel() - length + 1, (recipe.batch,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()])


def train(
    model: MambaForCausalLM,
    recipe: Recipe,
    record: Record,
    train_text: Tensor,
    validation_text: Tensor,
    arguments: argparse.Namespace,
) -> None:
    """Take steps until the budget is spent, saving whenever the validation loss is the best yet."""
    optimizer = build_optimizer(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    start = last_save = time.monotonic()
    cpu_start = time.process_time()
    progress, recent = 0.0, torch.zeros(())
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        rows = draw_batch(train_text, recipe, generator)
        loss = model(rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()

        record.steps += 1
        record.train_bytes_read += recipe.batch * recipe.window
        record.seconds = time.monotonic() - start
        record.cpu_seconds = time.process_time() - cpu_start
        recent = loss.detach() if record.steps == 1 else 0.95 * recent + 0.05 * loss.detach()
        progress = budget_spent(record, arguments)
        if record.steps % arguments.report_every == 0:
            report(record, float(recent), progress)
        minutes_unsaved = (time.monotonic() - last_save) / 60
        if minutes_unsaved >= arguments.save_every or progress >= 1.0:
            keep_if_best(model, recipe, record, float(recent), validation_text, arguments)
            last_save = time.monotonic()


def budget_spent(record: Record, arguments: argparse.Namespace) -> float:
    """Which share of the steps, or else of the processor time of all threads, is used up.

    Processor time, because it means the same on a busy machine and on an idle one.
    """
    if arguments.steps:
        return float(record.steps / arguments.steps)
    return float(record.cpu_seconds / (60.0 * arguments.minutes))


def report(record: Record, train_loss: float, progress: float) -> None:
    """One line about how it goes."""
    left = record.seconds * (1.0 / progress - 1.0)
    print(
        f"step {record.steps:6}  loss {train_loss:.4f}  "
        f"{record.train_bytes_read / record.seconds:,.0f} tokens/s  {left / 60:.1f} minutes left",
        flush=True,
    )


def keep_if_best(
    model: MambaForCausalLM,
    recipe: Recipe,
    record: Record,
    train_loss: float,
    validation_text: Tensor,
    arguments: argparse.Namespace,
) -> None:
    """Look at the validation loss (on every fourth window) and save the model if it is better."""
    model.eval()
    loss = loss_of_windows(model, validation_text, recipe.window, every=4)
    model.train()
    record.curve.append(
        {
            "step": record.steps,
            "minutes": round(record.seconds / 60, 2),
            "train_loss": round(train_loss, 4),
            "validation_loss": round(loss, 4),
        }
    )
    print(f"step {record.steps:6}  validation loss {loss:.4f}", flush=True)
    if loss < record.best_loss:
        record.best_loss, record.best_step = loss, record.steps
        save(model, arguments.output)


def save(model: MambaForCausalLM, folder: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer, replacing older ones file by file."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
    save_byte_tokenizer(partial)
    for path in partial.iterdir():
        path.replace(folder / path.name)
    partial.rmdir()


def finish(
    recipe: Recipe, record: Record, validation_text: Tensor, arguments: argparse.Namespace
) -> None:
    """Measure the stored weights, and write down the recipe, the results and a sample."""
    # Stored in bfloat16, computed in float32: what is measured is what is shipped.
    model = MambaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32).eval()
    result: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "validation_bytes": validation_text.numel(),
        "validation_loss_windows": loss_of_windows(model, validation_text, recipe.window),
        "validation_loss_stream": loss_of_stream(model, validation_text),
        "sample": sample(model, "ROMEO:\n", 600),
    }
    details = {
        "data": arguments.data.name,
        "recipe": asdict(recipe),
        "budget": {"minutes": arguments.minutes, "steps": arguments.steps},
        "threads": arguments.threads,
        "torch": torch.__version__,
        "record": asdict(record),
        "result": result,
    }
    text = json.dumps(details, indent=2) + "\n"
    (arguments.output / "training.json").write_text(text, encoding="utf-8")
    write_model_card(arguments.output, details)
    print(
        f"validation loss in nats per byte: {result['validation_loss_windows']:.4f} in windows of "
        f"{recipe.window}, {result['validation_loss_stream']:.4f} as one stream"
    )


def sample(model: MambaForCausalLM, prompt: str, length: int) -> str:
    """The prompt and how the model goes on from it, at temperature 0.8 and with a fixed seed."""
    torch.manual_seed(1)
    prompt_ids = torch.tensor([list(prompt.encode())])
    tokens = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=length,
        do_sample=True,
        temperature=0.8,
        top_k=0,
    )
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


if __name__ == "__main__":
    main()
