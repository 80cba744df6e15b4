"""A small DNA model learns which bases are hidden, from both sides and for both strands.

    anymamba run examples/dna/train.py          on any machine
    python examples/dna/train.py                where the original mamba_ssm runs

The architecture is that of "Caduceus: Bi-Directional Equivariant Long-Range DNA Sequence
Modeling" (arXiv 2403.03234): what the model says of a strand and of its reverse complement is
the same, by construction. The sequences are drawn by this script: random bases, and among them
motifs on either strand, as binding sites are.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
import torch.nn.functional as F
from mamba_ssm import Mamba
from mamba_ssm.modules.block import Block
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from torch import Tensor, nn

# In this order the complement of base i is base 3 - i. The fifth symbol hides a base.
BASES = "ACGT"
HIDDEN = len(BASES)
LENGTH, MOTIFS, MOTIF_LENGTH = 128, 8, 12


def main() -> None:
    """Train, then restore hidden bases in new sequences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, and less is asked")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps, least = (40, 0.3) if arguments.quick else (400, 0.85)

    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    genome = Genome(device)
    model = EquivariantModel(width=48, depth=2).to(device)
    train(model, genome, steps)
    accuracy, difference = evaluated(model, genome)
    print(f"hidden bases of motifs restored: {accuracy:.3f} (a guess: 0.250, asked: {least})")
    print(f"largest difference between the strands' logits: {difference:.1e}")
    assert accuracy >= least, "it has not learned"
    assert difference < 1e-3, "the strands do not agree"


class BidirectionalMamba(nn.Module):
    """Two Mambas, one for each direction, that share their large projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.forwards, self.backwards = Mamba(width), Mamba(width)
        self.backwards.in_proj.weight = self.forwards.in_proj.weight
        self.backwards.out_proj.weight = self.forwards.out_proj.weight

    def forward(self, hidden: Tensor, inference_params: object = None) -> Tensor:
        """(batch, length, width) to the same; position t sees both sides."""
        return self.forwards(hidden) + self.backwards(hidden.flip(1)).flip(1)


class EquivariantModel(nn.Module):
    """From bases (batch, length) to the logits of the four bases at each position.

    Both strands go through the same weights, as rows of one batch. The other strand's logits are
    turned back (its direction, and its bases to their complements) and added.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(BASES) + 1, width)
        block = partial(
            Block,
            mixer_cls=BidirectionalMamba,
            mlp_cls=nn.Identity,
            norm_cls=RMSNorm,
            fused_add_norm=True,
            residual_in_fp32=True,
        )
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, len(BASES))

    def forward(self, bases: Tensor) -> Tensor:
        """The sum of what the two strands say."""
        given, other = self.strand(torch.cat([bases, reverse_complement(bases)])).chunk(2)
        return given + other.flip(1, 2)

    def strand(self, bases: Tensor) -> Tensor:
        """The logits from one strand."""
        hidden, residual = self.embedding(bases), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        return self.head(self.norm(hidden, residual=residual))


def reverse_complement(bases: Tensor) -> Tensor:
    """What the other strand reads; what is hidden stays hidden."""
    return torch.where(bases == HIDDEN, HIDDEN, len(BASES) - 1 - bases).flip(-1)


class Genome:
    """Draws sequences; its motifs stay the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.motifs = torch.randint(len(BASES), (MOTIFS, MOTIF_LENGTH), device=device)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Sequences (batch, LENGTH), and where motifs stand in them."""
        bases = torch.randint(len(BASES), (batch, LENGTH), device=self.device)
        is_motif = torch.zeros_like(bases, dtype=torch.bool)
        both_strands = torch.cat([self.motifs, reverse_complement(self.motifs)])
        slot = 2 * MOTIF_LENGTH  # one motif in each, anywhere
        for start in range(0, LENGTH - slot + 1, slot):
            which = torch.randint(len(both_strands), (batch,), device=self.device)
            first = start + torch.randint(MOTIF_LENGTH + 1, (batch, 1), device=self.device)
            places = first + torch.arange(MOTIF_LENGTH, device=self.device)
            bases.scatter_(1, places, both_strands[which])
            is_motif.scatter_(1, places, True)
        return bases, is_motif

    def hide(self, bases: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences with 15 of 100 bases hidden, and where."""
        hidden = torch.rand(bases.shape, device=self.device) < 0.15
        return torch.where(hidden, HIDDEN, bases), hidden


def train(model: EquivariantModel, genome: Genome, steps: int, batch: int = 24) -> None:
    """Restore what is hidden, in new sequences at each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        bases, _ = genome.draw(batch)
        visible, hidden = genome.hide(bases)
        loss = F.cross_entropy(model(visible)[hidden], bases[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step:4}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def evaluated(model: EquivariantModel, genome: Genome) -> tuple[float, float]:
    """The share of restored bases in motifs, and how far the two strands' answers differ."""
    model.eval()
    bases, is_motif = genome.draw(200)
    visible, hidden = genome.hide(bases)
    logits = model(visible)
    asked = hidden & is_motif
    accuracy = (logits.argmax(dim=-1) == bases)[asked].float().mean()
    from_other_strand = model(reverse_complement(visible)).flip(1, 2)
    return float(accuracy), float((logits - from_other_strand).abs().max())


if __name__ == "__main__":
    main()
