"""Selective copying: Mamba, and the same model without selection, remember scattered tokens.

    python examples/selective_copying/train.py            the full run
    python examples/selective_copying/train.py --quick    seconds, a first look

Tokens to remember lie scattered among noise; markers at the end ask for them in their order. A
model whose step size and maps B and C are the same at each position cannot tell noise from what is
to be remembered. Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv 2312.00752), section 4.1.1 and table 1, where sequences are 4,096 tokens long. Here they are
shorter, so that a processor trains both models.
"""

from __future__ import annotations

import math
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from synthetic_tasks import (
    VOCABULARY,
    Batch,
    Recipe,
    begin,
    command_line,
    logits_where_asked,
    small_model,
    train,
    write,
)

from anymamba import MambaForCausalLM

NOISE, MARKER = 0, VOCABULARY - 1  # 14 tokens between them are remembered


@dataclass(frozen=True)
class Task:
    """How many tokens to remember, scattered over how many positions; the markers follow."""

    remembered: int
    scattered_over: int


def main() -> None:
    """Train both models in the same way, test them, write the results."""
    parser = command_line(__doc__ or "", Path(__file__).parent / "results" / "full.json")
    parser.add_argument("--remembered", type=int, default=8, help="tokens, in the test")
    parser.add_argument("--scattered-over", type=int, default=248, help="positions, in the test")
    chosen = begin(parser)
    task, rows = Task(chosen.remembered, chosen.scattered_over), 1000
    recipe = Recipe(steps=5000, tokens_a_step=8192, learning_rate=2e-3)
    if chosen.quick:
        task, rows = Task(remembered=2, scattered_over=14), 500
        recipe = Recipe(steps=150, tokens_a_step=1024, learning_rate=8e-3)
    recipe = replace(recipe, steps=chosen.steps or recipe.steps)

    models = {}
    for name, change in (("selective", unchanged), ("time-invariant", without_selection)):
        torch.manual_seed(chosen.seed)
        model = change(small_model())
        print(f"{name}: {sum(weight.numel() for weight in model.parameters())} parameters")
        report_every = max(recipe.steps // 30, 1)
        history = train(
            model,
            lambda progress: growing(recipe.tokens_a_step, task, progress),
            recipe,
            report_every,
        )
        models[name] = {"history": history, "score": tested(model, task, rows)}
        print(f"{name}: {models[name]['score']}", flush=True)
    write(chosen.output, "selective_copying", chosen, recipe=recipe, setting=task, models=models)


class Constant(nn.Module):
    """Learned numbers that stand where a projection of the input stood.

    Args:
        width: how many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(width))

    def forward(self, x_ble: Tensor) -> Tensor:
        """(b, l, e) to (b, l, width), the same at each position."""
        return self.value.to(x_ble.dtype).expand(*x_ble.shape[:2], -1)


def unchanged(model: MambaForCausalLM) -> MambaForCausalLM:
    """Mamba as it is."""
    return model


def without_selection(model: MambaForCausalLM) -> MambaForCausalLM:
    """Take selection out: what x_proj would say of each token is one learned constant.

    Delta, B and C follow from it, and so are the same at each position; convolutions, gates and
    all else stay.

    Args:
        model: changed in place.
    """
    for layer in model.backbone.layers:
        layer.mixer.x_proj = Constant(layer.mixer.x_proj.out_features)
    return model


def growing(tokens: int, hardest: Task, progress: float) -> Batch:
    """A training batch: easy at first, and of the hardest task towards the end.

    Args:
        tokens: about how many in the batch.
        hardest: what the test asks for.
        progress: the share of training that is done. The easiest third of it goes up to the
            hardest task; from two thirds on nothing else is drawn.
    """
    task = hardest
    if progress < 2 / 3:
        reach = min(0.1 + 2 * progress, 1.0)
        remembered = random.randint(1, math.ceil(reach * hardest.remembered))
        most = max(math.ceil(reach * hardest.scattered_over), remembered)
        task = Task(remembered, random.randint(remembered, most))
    return draw(max(tokens // (task.scattered_over + task.remembered), 1), task)


def draw(rows: int, task: Task) -> Batch:
    """Sequences of noise with tokens to remember, then one marker for each of these.

    Args:
        rows: b.
        task: how many tokens, and among how many positions.

    Returns:
        The sequences; an answer is asked for at each marker.
    """
    shape = (rows, task.remembered)
    values = torch.randint(NOISE + 1, MARKER, shape)
    places = torch.rand(rows, task.scattered_over).argsort(1)[:, : task.remembered].sort(1).values
    scattered = torch.full((rows, task.scattered_over), NOISE).scatter_(1, places, values)
    tokens = torch.cat([scattered, torch.full(shape, MARKER)], 1)
    return Batch(tokens, tokens == MARKER, values.flatten())


@torch.no_grad()
def tested(model: MambaForCausalLM, task: Task, rows: int) -> dict[str, float]:
    """The share of tokens that are right in new sequences, and of sequences without a mistake.

    Args:
        model: trained.
        task: as in training.
        rows: how many sequences.
    """
    start = time.perf_counter()
    right = []
    for part in torch.arange(rows).split(50):
        batch = draw(len(part), task)
        answers = logits_where_asked(model, batch).argmax(-1)
        right.append((answers == batch.answers).view(len(part), task.remembered))
    right_rows = torch.cat(right)
    return {
        "rows": rows,
        "accuracy": round(float(right_rows.float().mean()), 4),
        "whole_rows": round(float(right_rows.all(1).float().mean()), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
