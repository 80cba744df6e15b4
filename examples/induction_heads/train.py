"""Induction heads: what followed the trigger the last time? Trained at 256 tokens, asked at 2^20.

    python examples/induction_heads/train.py            the full run
    python examples/induction_heads/train.py --quick    seconds, a first look

A sequence is random tokens, among them once the trigger, and after it the token to remember. It
ends with the trigger again, and the model is to name the token that followed the first. Source:
"Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section
4.1.2 and table 2.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

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
    chosen = begin(parser)
    recipe = Recipe(steps=1500, tokens_a_step=4096, learning_rate=4e-3)
    exponents, tokens_a_test = range(6, 21), 1 << 23
    if chosen.quick:
        recipe = Recipe(steps=60, tokens_a_step=2048, learning_rate=8e-3)
        exponents, tokens_a_test = range(6, 11), 1 << 13
        chosen.lengths = [32, 64]
    recipe = replace(recipe, steps=chosen.steps or recipe.steps)

    model = small_model()

    def one_batch(progress: float) -> Batch:
        length = random.choice(chosen.lengths)
        return draw(recipe.tokens_a_step // length, length, chosen.most_triggers)

    history = train(model, one_batch, recipe, report_every=max(recipe.steps // 30, 1))
    scores = []
    for length in (1 << exponent for exponent in exponents):
        scores.append(tested(model, length, rows=max(8, min(256, tokens_a_test // length))))
        print("  ".join(f"{name} {value}" for name, value in scores[-1].items()), flush=True)
    write(
        chosen.output,
        "induction_heads",
        chosen,
        recipe=recipe,
        training_lengths=chosen.lengths,
        most_triggers=chosen.most_triggers,
        history=history,
        scores=scores,
    )


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
def tested(model: MambaForCausalLM, length: int, rows: int) -> dict[str, float]:
    """The share of rows whose answer at the last position is right, with one trigger before it.

    Args:
        model: trained.
        length: l.
        rows: how many sequences; no training sequence is among them but by chance.
    """
    start = time.perf_counter()
    batch = draw(rows, length, most_triggers=1)
    cache = MambaCache(model.config, rows)
    for piece in batch.tokens.split(PIECE, dim=1):
        logits = model(piece, cache=cache, logits_to_keep=1).logits[:, -1]
    right = int((logits.argmax(-1) == batch.answers).sum())
    return {
        "length": length,
        "rows": rows,
        "right": right,
        "accuracy": round(right / rows, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
