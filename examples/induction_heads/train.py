"""Induction heads: what followed the trigger the last time? Trained at 256 tokens, asked at 2^20.

    python examples/induction_heads/train.py            the full run
    python examples/induction_heads/train.py --quick    seconds, a first look

A sequence is random tokens, among them once the trigger, and after it the token to remember. It
ends with the trigger again, and the model is to name the token that followed the first. Source:
"Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section
4.1.2 and table 2.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from synthetic_tasks import (
    VOCABULARY,
    Batch,
    Recipe,
    begin,
    command_line,
    small_model,
    train,
    write,
)

from anymamba import MambaCache, MambaForCausalLM

TRIGGER = VOCABULARY - 1  # the others are ordinary: a guess is right once in 15
SMALLEST_STEP = 1e-9  # a million of these leave a state as it was
PIECE = 4096  # positions at once in a test; the state is carried from piece to piece


def main() -> None:
    """Train, test at each length, write the results."""
    parser = command_line(__doc__ or "", Path(__file__).parent / "results" / "full.json")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[32, 64, 128, 256], help="of training sequences"
    )
    parser.add_argument(
        "--most-triggers", type=int, default=16, help="in a training sequence, before the last"
    )
    parser.add_argument(
        "--step-cost", type=float, default=0.01, help="what step sizes cost in training"
    )
    parser.add_argument("--longest", type=int, default=1 << 20, help="sequence of the test")
    parser.add_argument("--rows", type=int, default=16, help="in tests beyond 8,192 tokens")
    chosen = begin(parser)
    recipe = Recipe(steps=300, tokens_a_step=2048, learning_rate=5e-3)
    if chosen.quick:
        recipe = Recipe(steps=60, tokens_a_step=2048, learning_rate=8e-3)
        chosen.lengths, chosen.longest = [32, 64], 1024
    recipe = replace(recipe, steps=chosen.steps or recipe.steps)

    model = small_model()

    def one_batch(progress: float) -> Batch:
        length = random.choice(chosen.lengths)
        return draw(recipe.tokens_a_step // length, length, chosen.most_triggers)

    report_every = max(recipe.steps // 30, 1)
    with step_sizes_cost(model, chosen.step_cost) as cost:
        history = train(model, one_batch, recipe, report_every, cost)
    # Short sequences are cheap, so there are more of them.
    turn = min(1 << 13, chosen.longest)
    scores = []
    for score in chain(
        tested(model, 64, 64, turn), tested(model, chosen.rows, 2 * turn, chosen.longest)
    ):
        print("  ".join(f"{name} {value}" for name, value in score.items()), flush=True)
        scores.append(score)
    write(
        chosen.output,
        "induction_heads",
        chosen,
        recipe=recipe,
        training_lengths=chosen.lengths,
        most_triggers=chosen.most_triggers,
        step_cost=chosen.step_cost,
        history=history,
        scores=scores,
    )


@contextmanager
def step_sizes_cost(
    model: MambaForCausalLM, weight: float
) -> Iterator[Callable[[], Tensor | float]]:
    """Make it cost something to touch the state.

    At 256 tokens a step size of 0.001 at each token between does no harm, and the loss says nothing
    against it; after a million such tokens nothing is left of the state. So the mean of Delta's
    logarithm, above that of SMALLEST_STEP, is added to the loss.

    Args:
        model: its hooks are set inside the block only.
        weight: of the mean; 0 sets no hooks.

    Yields:
        What gives the cost of the last pass.
    """
    last: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, before_softplus_ble: Tensor) -> None:
            # Where a step is small, softplus is exp: this is its logarithm.
            last[layer] = F.relu(before_softplus_ble - math.log(SMALLEST_STEP)).mean()

        return hook

    layers = model.backbone.layers if weight else []
    handles = [
        layer.mixer.dt_proj.register_forward_hook(keep(index)) for index, layer in enumerate(layers)
    ]
    try:
        yield lambda: weight * sum(last.values())
    finally:
        for handle in handles:
            handle.remove()


def draw(rows: int, length: int, most_triggers: int) -> Batch:
    """Sequences that end with the trigger; each one before it is followed by the row's value.

    Args:
        rows: b.
        length: l, at least 4.
        most_triggers: each row has between 1 and so many triggers before the last, log-uniform.

    Returns:
        The sequences. An answer is asked for at each trigger but a row's first, for what follows
        there can be known.
    """
    ordinary = VOCABULARY - 1
    value_b1 = torch.randint(ordinary, (rows, 1))
    # Triggers stand in slots of two positions, so that none takes the place of another's value.
    slots = (length - 1) // 2
    count_b1 = (most_triggers ** torch.rand(rows, 1)).round().clamp(max=slots)
    chosen = torch.rand(rows, slots).argsort(1).argsort(1) < count_b1
    first = int(torch.randint(length - 2 * slots, (1,)))
    is_trigger = torch.zeros(rows, length, dtype=torch.bool)
    is_trigger[:, first : first + 2 * slots : 2] = chosen
    after_trigger = F.pad(is_trigger, (1, 0))[:, :-1]
    tokens = torch.randint(ordinary, (rows, length))
    tokens = torch.where(after_trigger, value_b1, tokens)
    is_trigger[:, -1] = True
    tokens[is_trigger] = TRIGGER
    asked = is_trigger & (is_trigger.cumsum(1) > 1)
    return Batch(tokens, asked, value_b1.expand(rows, length)[asked])


@torch.no_grad()
def tested(
    model: MambaForCausalLM, rows: int, shortest: int, longest: int
) -> Iterator[dict[str, float]]:
    """The share of right answers at each power of two between two lengths.

    The rows are read once, in pieces, with the state carried. The first trigger and its value stand
    in the first 64 positions, so the model is asked over nearly the whole length. At each length
    the state is forked, and the fork reads the trigger in the last position.

    Args:
        model: trained.
        rows: how many sequences.
        shortest: powers of two, from 64 on; the first length that is asked.
        longest: the last.
    """
    start, read = time.perf_counter(), 63
    begins = draw(rows, read + 1, most_triggers=1)
    cache, length = MambaCache(model.config, rows), shortest
    model(begins.tokens[:, :read], cache=cache, logits_to_keep=1)
    trigger_b1 = begins.tokens[:, read:]
    while length <= longest:
        while read < length - 1:
            piece = torch.randint(VOCABULARY - 1, (rows, min(PIECE, length - 1 - read)))
            model(piece, cache=cache, logits_to_keep=1)
            read += piece.shape[1]
        logits = model(trigger_b1, cache=cache.clone()).logits[:, -1]
        right = int((logits.argmax(-1) == begins.answers).sum())
        yield {
            "length": length,
            "rows": rows,
            "right": right,
            "accuracy": round(right / rows, 4),
            "seconds": round(time.perf_counter() - start, 1),
        }
        length *= 2


if __name__ == "__main__":
    main()
