"""A small Vision Mamba learns to name shapes in images that this script draws.

    anymamba run examples/vision/train.py          on any machine
    python examples/vision/train.py                where the original mamba_ssm runs

The architecture is that of "Vision Mamba: Efficient Visual Representation Learning with
Bidirectional State Space Model" (arXiv 2401.09417): an image is cut into patches, a class token
stands in their middle, and each block reads the sequence from both ends.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from mamba_ssm import Mamba
from mamba_ssm.ops.triton.layer_norm import RMSNorm, rms_norm_fn
from torch import Tensor, nn

SHAPES = ("disc", "ring", "square", "diamond", "plus", "cross")
SIZE, PATCH = 32, 4


def main() -> None:
    """Train, then name the shapes in new images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, and less is asked")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps, least = (40, 0.22) if arguments.quick else (300, 0.9)

    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VisionMamba(width=64, depth=3).to(device)
    train(model, steps, device)
    accuracy = accuracy_of(model, device)
    print(f"test accuracy {accuracy:.3f} (a guess: {1 / len(SHAPES):.3f}, asked: {least})")
    assert accuracy >= least, "it has not learned"


class BidirectionalBlock(nn.Module):
    """Add, norm, then two Mambas: one reads from the front, the other from the back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.forwards = Mamba(width, d_state=8)
        self.backwards = Mamba(width, d_state=8)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Takes and returns what is to be added, and the sum so far: (batch, length, width)."""
        hidden, residual = rms_norm_fn(
            hidden,
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            eps=self.norm.eps,
            prenorm=True,
            residual_in_fp32=True,
        )
        return self.forwards(hidden) + self.backwards(hidden.flip(1)).flip(1), residual


class VisionMamba(nn.Module):
    """From images (batch, 3, SIZE, SIZE) to a score for each shape (batch, shapes)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        patches = (SIZE // PATCH) ** 2
        self.patches = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))
        self.blocks = nn.ModuleList(BidirectionalBlock(width) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        """The scores are read off the class token."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        middle = tokens.shape[1] // 2
        class_token = self.class_token.expand(len(images), -1, -1)
        hidden = torch.cat([tokens[:, :middle], class_token, tokens[:, middle:]], dim=1)
        hidden, residual = hidden + self.positions, None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        hidden = self.norm(hidden, residual=residual)
        return self.head(hidden[:, middle])


def train(model: VisionMamba, steps: int, device: torch.device, batch: int = 64) -> None:
    """Each step sees new images, so that nothing can be learned by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        images, labels = draw(batch, device)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step:4}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def accuracy_of(model: VisionMamba, device: torch.device) -> float:
    """The share of new images whose shape is named correctly."""
    model.eval()
    images, labels = draw(600, device)
    return float((model(images).argmax(dim=1) == labels).float().mean())


def draw(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images of one shape each, at a random place, of a random size and colour, under noise."""
    labels = torch.randint(len(SHAPES), (count,), device=device)
    radius = torch.empty(count, 1, 1, device=device).uniform_(6, 10)
    centre_x, centre_y = (radius + torch.rand_like(radius) * (SIZE - 2 * radius) for _ in "xy")
    grid = torch.arange(SIZE, device=device) + 0.5
    x, y = (grid[None, None, :] - centre_x) / radius, (grid[None, :, None] - centre_y) / radius
    masks = torch.stack(list(inside(x, y)), dim=1)  # (count, shapes, SIZE, SIZE)
    mask = masks[torch.arange(count), labels][:, None]
    colour = torch.empty(count, 3, 1, 1, device=device).uniform_(0.5, 1)
    background = torch.empty(count, 3, 1, 1, device=device).uniform_(0, 0.3)
    images = torch.where(mask, colour, background)
    images = images + 0.1 * torch.randn_like(images)
    return 2 * images - 1, labels


def inside(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Where each of SHAPES is, in a frame in which it reaches from -1 to 1."""
    across, steep = torch.maximum(x.abs(), y.abs()), x.abs() + y.abs()
    distance = torch.hypot(x, y)
    narrow = torch.minimum(x.abs(), y.abs()) < 0.3
    diagonal = (x.abs() - y.abs()).abs() < 0.4
    return (
        distance < 1,
        (distance < 1) & (distance > 0.55),
        across < 0.85,
        steep < 1.2,
        (across < 1) & narrow,
        (across < 0.85) & diagonal,
    )


if __name__ == "__main__":
    main()
