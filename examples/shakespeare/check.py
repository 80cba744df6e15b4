"""Check a model that was trained on Shakespeare: its losses, through Transformers' own class.

    python examples/shakespeare/check.py --data tinyshakespeare.txt
    python examples/shakespeare/check.py my-model --data tinyshakespeare.txt --every 1

The first 90 % of the bytes are the training part, the last 10 % the validation part, which no step
of training reads. A part is read in windows side by side, each from an empty state; a rest that
fills no window is left out. Ends with 1 where the loss on the validation part is not the one in the
model's `training.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy

from anymamba.assets import bundled_model

WINDOW, BATCH = 256, 16
# Transformers adds in another order and in float32: the fifth digit may differ, the fourth not.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Part:
    """A part of the text and its loss in nats per byte, over `windows` windows."""

    name: str
    size: int
    windows: int
    loss: float


def main() -> int:
    """Measure both parts, print them, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=bundled_model(), help="a folder")
    parser.add_argument("--data", type=Path, required=True, help="the text")
    parser.add_argument(
        "--every", type=int, default=16, help="read each so-manieth training window (default 16)"
    )
    arguments = parser.parse_args()
    parts = losses(arguments.model, arguments.data, arguments.every)
    for part in parts:
        print(
            f"{part.name:<11} {part.loss:.4f} nats per byte  "
            f"({part.windows:,} windows of {WINDOW} of {part.size:,} bytes)"
        )
    noted = noted_loss(arguments.model)
    agree = abs(parts[1].loss - noted) <= TOLERANCE
    print(f"noted       {noted:.4f} for the validation part: {'agrees' if agree else 'DIFFERS'}")
    return int(not agree)


def losses(folder: Path, text: Path, every: int = 1) -> tuple[Part, Part]:
    """The losses on the training and the validation part, by `transformers.MambaForCausalLM`.

    Args:
        folder: of a byte-level model.
        text: the file.
        every: of the training part's windows, read each so-manieth; the other part is read whole.
    """
    model = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers."), "the drop-in is installed"
    training, validation = split(text)
    return (
        measured("training", model, training, every),
        measured("validation", model, validation, 1),
    )


def split(text: Path) -> tuple[Tensor, Tensor]:
    """The file's bytes, cut at nine tenths as in nanoGPT."""
    data = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    border = int(0.9 * data.numel())
    return data[:border], data[border:]


@torch.inference_mode()
def measured(name: str, model: torch.nn.Module, data: Tensor, every: int) -> Part:
    """One part's loss."""
    # One byte more than predictions: a window's last target begins the next one.
    windows = data.unfold(0, WINDOW + 1, WINDOW)[::every]
    total = 0.0
    batches = windows.split(BATCH)
    for rows in track(batches, description=name, console=Console(stderr=True), transient=True):
        logits = model(rows[:, :-1], use_cache=False).logits
        total += float(cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return Part(name, data.numel(), len(windows), total / (len(windows) * WINDOW))


def noted_loss(folder: Path) -> float:
    """What the trainer measured on the stored weights."""
    content = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return float(content["result"]["validation_loss_windows"])


if __name__ == "__main__":
    sys.exit(main())
