"""A small Mamba-2 forecasts the next day of hourly series, and is held against last week's.

    anymamba run examples/forecast/train.py          on any machine
    python examples/forecast/train.py                where the original mamba_ssm runs

The series are drawn by this script: daily and weekly patterns, trend and noise with a memory, as
the loads of power grids have. The baseline is seasonal-naive: the same hours one day or one week
ago, whichever is the better. As in "A Time Series is Worth 64 Words" (arXiv 2211.14730) the past
is cut into patches, and each window is normalized by its own mean and deviation.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from mamba_ssm import Mamba2
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from torch import Tensor, nn

DAY, WEEK = 24, 168
PAST, FUTURE, PATCH = 2 * WEEK, DAY, 6


def main() -> None:
    """Train, then forecast series that were not seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, and less is asked")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps, most = (40, 1.3) if arguments.quick else (400, 0.75)

    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Forecaster(width=64, depth=2).to(device)
    train(model, steps, device)
    share = share_of_baseline(model, device)
    print(f"the model's error is {share:.3f} of the baseline's (asked: at most {most})")
    assert share <= most, "it does not beat the baseline"


class Forecaster(nn.Module):
    """From the past (batch, PAST) to the future (batch, FUTURE)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH, width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))
        self.mixers = nn.ModuleList(
            Mamba2(width, d_state=32, headdim=32, chunk_size=64) for _ in range(depth)
        )
        self.last_norm = RMSNorm(width)
        self.head = nn.Linear(PAST // PATCH * width, FUTURE)

    def forward(self, past: Tensor) -> Tensor:
        """All positions together tell the whole future."""
        mean, deviation = past.mean(dim=1, keepdim=True), past.std(dim=1, keepdim=True)
        patches = ((past - mean) / deviation).unflatten(1, (PAST // PATCH, PATCH))
        hidden = self.patches(patches)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            hidden = hidden + mixer(norm(hidden))
        return self.head(self.last_norm(hidden).flatten(1)) * deviation + mean


def train(model: Forecaster, steps: int, device: torch.device, batch: int = 64) -> None:
    """On new series at each step. The error counts relative to the past's deviation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        past, future = draw(batch, device)
        loss = ((model(past) - future).abs() / past.std(dim=1, keepdim=True)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step:4}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def share_of_baseline(model: Forecaster, device: torch.device) -> float:
    """The mean absolute error on new series, as a share of the better baseline's."""
    model.eval()
    past, future = draw(1000, device)
    forecasts = {
        "the same hours yesterday": past[:, -DAY:],
        "the same hours last week": past[:, -WEEK : -WEEK + FUTURE],
        "the model": model(past),
    }
    errors = {name: float((future - guess).abs().mean()) for name, guess in forecasts.items()}
    for name, error in errors.items():
        print(f"mean absolute error of {name}: {error:.3f}")
    return errors.pop("the model") / min(errors.values())


def draw(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The past and the future of series whose sizes, shapes and phases are their own."""
    hours = torch.arange(PAST + FUTURE, device=device)

    def each(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, device=device).uniform_(low, high)

    phase = each(0, 2 * math.pi)
    angle = 2 * math.pi * hours / DAY + phase
    daily = torch.sin(angle) + each(0, 0.6) * torch.sin(2 * angle + each(0, 2 * math.pi))
    day_of_week = (hours + torch.randint(WEEK, (count, 1), device=device)) % WEEK // DAY
    is_weekend = day_of_week >= 5
    daily = daily * torch.where(is_weekend, each(0.2, 0.8), 1.0) - is_weekend * each(0, 1)
    trend = each(-1, 1) * hours / PAST
    series = each(-5, 5) + each(0.5, 2) * (daily + trend + each(0.05, 0.3) * noise(count, device))
    return series[:, :PAST], series[:, PAST:]


def noise(count: int, device: torch.device) -> Tensor:
    """Each hour keeps 0.7 of the noise before it; the deviation is 1."""
    fresh = torch.randn(PAST + FUTURE, count, device=device)
    values = [fresh[0]]
    for value in fresh[1:]:
        values.append(0.7 * values[-1] + math.sqrt(1 - 0.7**2) * value)
    return torch.stack(values, dim=1)


if __name__ == "__main__":
    main()
