"""What the paper's two synthetic tasks share: the model, the training loop, and the result file.

Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
section 4.1. Shapes: b batch, l length, v vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba import MambaConfig, MambaForCausalLM

VOCABULARY = 16


@dataclass(frozen=True)
class Batch:
    """Sequences (b, l), where an answer is asked for, and the answers in that order."""

    tokens: Tensor
    asked: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW without weight decay, warm-up over a twentieth, then a cosine to 0."""

    steps: int
    tokens_a_step: int
    learning_rate: float
    gradient_norm: float = 1.0


def command_line(description: str, results: Path) -> argparse.ArgumentParser:
    """The options that both scripts have.

    Args:
        description: what the script does.
        results: where a full run writes; a quick one writes only where it is told to.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, and less is asked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of training, instead of the recipe's")
    parser.add_argument("--threads", type=int, default=1, help="the model is too small for more")
    parser.add_argument("--output", type=Path, help=f"JSON file (default: {results.name} beside)")
    parser.set_defaults(results=results)
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and set threads and seed."""
    chosen = parser.parse_args()
    if chosen.output is None and not chosen.quick:
        chosen.output = chosen.results
    torch.set_num_threads(chosen.threads)
    random.seed(chosen.seed)
    torch.manual_seed(chosen.seed)
    return chosen


def small_model() -> MambaForCausalLM:
    """The paper's size for both tasks: 2 layers of width 64, 16 tokens."""
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2))


def train(
    model: MambaForCausalLM,
    draw: Callable[[float], Batch],
    recipe: Recipe,
    report_every: int,
    cost: Callable[[], Tensor | float] = lambda: 0.0,
) -> list[dict[str, float]]:
    """Train on new sequences at each step.

    Args:
        model: changed in place, and in evaluation mode afterwards.
        draw: makes one batch, told which share of training is done.
        recipe: how.
        cost: asked after each pass through the model, and added to the loss.
        report_every: so many steps lie between two lines of the history.

    Returns:
        The history: step, tokens and seconds so far, and loss and accuracy since the line before.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05
    )
    history, losses, right, asked, tokens = [], 0.0, 0, 0, 0
    start = time.perf_counter()
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = draw((step - 1) / recipe.steps)
        logits = logits_where_asked(model, batch)
        loss = F.cross_entropy(logits, batch.answers)
        optimizer.zero_grad()
        (loss + cost()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        schedule.step()
        tokens += batch.tokens.numel()
        losses += loss.item()
        right += int((logits.argmax(-1) == batch.answers).sum())
        asked += len(batch.answers)
        if step % report_every == 0:
            line = {
                "step": step,
                "tokens": tokens,
                "seconds": round(time.perf_counter() - start, 1),
                "loss": round(losses / report_every, 5),
                "accuracy": round(right / asked, 5),
            }
            print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
            history.append(line)
            losses, right, asked = 0.0, 0, 0
    model.eval()
    return history


def logits_where_asked(model: MambaForCausalLM, batch: Batch) -> Tensor:
    """Logits (number of answers, v); the head runs at no other position."""
    hidden_bld = model.backbone(batch.tokens, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden_bld[batch.asked])
    return logits


def write(path: Path | None, task: str, chosen: argparse.Namespace, **findings: Any) -> None:
    """Write what was found, with what is needed to find it again.

    Args:
        path: the JSON file; None writes nothing.
        task: the name of the task.
        chosen: the command line's options.
        **findings: recipes, histories and scores; dataclasses are written as their fields.
    """
    if path is None:
        return
    result = {
        "task": task,
        "date": datetime.now(UTC).date().isoformat(),
        "quick": chosen.quick,
        "seed": chosen.seed,
        "machine": machine(chosen.threads),
        **findings,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, default=asdict)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written to {path}")


def machine(threads: int) -> dict[str, Any]:
    """What the times depend on."""
    names = [
        line.partition(":")[2].strip()
        for line in _text("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_at_the_end": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in ("anymamba", "torch")},
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
