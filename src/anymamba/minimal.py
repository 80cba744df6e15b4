"""Mamba in one file: the specification that every faster path in this package is tested against.

The model is that of 'Mamba: Linear-Time Sequence Modeling with Selective State Spaces' (Gu and
Dao, arXiv 2312.00752), whose equations are quoted beside the lines that compute them. The idea
is in `MambaBlock.selective_scan`, the recurrence, and in `MambaBlock.ssm`, which makes the
recurrence depend on its input; the rest of `MambaBlock` adds a convolution and a gate, and
`ResidualBlock` and `Mamba` stack such blocks between an embedding and a vocabulary.

A tensor's name ends in its shape, one letter an axis:

    b  batch             d  model width           n  state size of one channel
    l  sequence length   e  inner width           r  rank of the step size
    v  vocabulary        k  convolution width

Run it with `python -m anymamba.minimal`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.errors import ConfigError, InputError

__all__ = ["Mamba", "MambaBlock", "ModelArgs", "RMSNorm", "ResidualBlock"]


@dataclass
class ModelArgs:
    """The shape of a model (sections 3.4 and 3.6 of the paper).

    Args:
        d_model: width of the residual stream, d.
        n_layer: number of residual blocks.
        vocab_size: number of tokens; rounded up to a multiple of `pad_vocab_size_multiple`.
        d_state: numbers that each channel remembers, n.
        expand: inner width as a multiple of the model width, e = expand * d.
        dt_rank: rank r of the projection that makes the step size; 'auto' is ceil(d / 16).
        d_conv: width of the causal convolution, k.
        pad_vocab_size_multiple: what the vocabulary is rounded up to.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections into and out of a block have one.

    Raises:
        ConfigError: a value makes no sense; the message names field and value.

    >>> args = ModelArgs(d_model=40, n_layer=2, vocab_size=1001)
    >>> args.d_inner, args.dt_rank, args.vocab_size
    (80, 3, 1008)
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    expand: int = 2
    dt_rank: int | str = "auto"
    d_conv: int = 4
    pad_vocab_size_multiple: int = 8
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("conv_bias", "bias"):
                if not isinstance(value, bool):
                    raise ConfigError(f"{name} must be True or False, got {value!r}")
            elif (name, value) == ("dt_rank", "auto"):
                self.dt_rank = math.ceil(self.d_model / 16)  # fields come in order: d_model is fine
            elif type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple

    @property
    def d_inner(self) -> int:
        """The inner width e of a block."""
        return self.expand * self.d_model


class Mamba(nn.Module):
    """A language model: embedding, residual blocks, norm, and the embedding again as the head.

    Args:
        args: the shape of the model.

    >>> model = Mamba(ModelArgs(d_model=32, n_layer=1, vocab_size=64))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.embedding = nn.Embedding(args.vocab_size, args.d_model)
        self.layers = nn.ModuleList([ResidualBlock(args) for _ in range(args.n_layer)])
        self.norm_f = RMSNorm(args.d_model)
        self.lm_head = nn.Linear(args.d_model, args.vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight  # tied: one matrix reads and writes tokens
        nn.init.normal_(self.embedding.weight, std=0.02)  # as a head, it must start small

    def forward(self, input_ids_bl: Tensor) -> Tensor:
        """Score every token as the one that follows, at each position.

        Args:
            input_ids_bl: token numbers, (b, l); either axis may be empty.

        Returns:
            Logits, (b, l, v), float32 whatever the weights are stored in.

        Raises:
            InputError: `input_ids_bl` does not have two axes.
        """
        if input_ids_bl.dim() != 2:
            shape = tuple(input_ids_bl.shape)
            raise InputError(f"input_ids must have shape (batch, length), got {shape}")
        # Every block adds to this stream; kept in float32, many small additions are not lost.
        hidden_bld = self.embedding(input_ids_bl).float()
        for layer in self.layers:
            hidden_bld = layer(hidden_bld)
        logits_blv: Tensor = self.lm_head(self.norm_f(hidden_bld))
        return logits_blv.float()


class ResidualBlock(nn.Module):
    """The unit that repeats: hidden + mixer(norm(hidden)), (b, l, d) to (b, l, d).

    Args:
        args: the shape of the model.

    >>> block = ResidualBlock(ModelArgs(d_model=32, n_layer=1, vocab_size=64))
    >>> block(torch.zeros(1, 3, 32)).shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.mixer = MambaBlock(args)
        self.norm = RMSNorm(args.d_model)

    def forward(self, hidden_bld: Tensor) -> Tensor:
        mixed_bld: Tensor = self.mixer(self.norm(hidden_bld))
        return hidden_bld + mixed_bld


class MambaBlock(nn.Module):
    """A gated selective state space model: the only place where positions see each other.

    Two projections of the input run side by side: x goes through a short convolution and the
    state space model, z decides how much of the outcome passes (figure 3 of the paper).

    Args:
        args: the shape of the model.

    >>> block = MambaBlock(ModelArgs(d_model=32, n_layer=1, vocab_size=64))
    >>> block(torch.zeros(1, 3, 32)).shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        d, e, n, r, k = args.d_model, args.d_inner, args.d_state, int(args.dt_rank), args.d_conv
        self.r, self.n, self.k = r, n, k
        self.in_proj = nn.Linear(d, 2 * e, bias=args.bias)
        self.conv1d = nn.Conv1d(e, e, k, groups=e, bias=args.conv_bias)  # one filter a channel
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e)
        self.out_proj = nn.Linear(e, d, bias=args.bias)

        # S4D-real (section 3.6): A = -1, -2, ..., -n, so a channel forgets at n different rates.
        # Its logarithm is learned: A = -exp(A_log) stays negative, and the state cannot blow up.
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(e, 1))  # (e, n)
        self.D = nn.Parameter(torch.ones(e))

        # Step sizes start between 0.001 and 0.1, spread evenly on a log scale. The bias is what
        # softplus turns into them; the weight makes them depend on the input.
        delta_e = torch.empty(e).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta_e + torch.log(-torch.expm1(-delta_e)))  # softplus⁻¹
            self.dt_proj.weight.uniform_(-(r**-0.5), r**-0.5)
            self.out_proj.weight /= math.sqrt(args.n_layer)  # depth does not swell the stream

    def forward(self, hidden_bld: Tensor) -> Tensor:
        """(b, l, d) to (b, l, d); no position sees a later one."""
        x_ble, z_ble = self.in_proj(hidden_bld).chunk(2, dim=-1)
        x_ble = F.silu(self.causal_conv1d(x_ble))
        y_ble = self.ssm(x_ble)
        mixed_bld: Tensor = self.out_proj(y_ble * F.silu(z_ble))
        return mixed_bld

    def causal_conv1d(self, x_ble: Tensor) -> Tensor:
        """Σ_j w_j x_{t-(k-1)+j} + bias in each channel, with zeros before the start."""
        length = x_ble.shape[1]
        past_and_x = F.pad(x_ble.float(), (0, 0, self.k - 1, 0))  # (b, k - 1 + l, e)
        w_ek = self.conv1d.weight.squeeze(1)
        out_ble = torch.zeros_like(x_ble, dtype=torch.float32)
        for j in range(self.k):
            out_ble = out_ble + w_ek[:, j] * past_and_x[:, j : j + length]
        if self.conv1d.bias is not None:
            out_ble = out_ble + self.conv1d.bias
        return out_ble.to(x_ble.dtype)

    def ssm(self, x_ble: Tensor) -> Tensor:
        """The state space model that computes its own Δ, B and C from x: algorithm 2.

        A and D are the same everywhere. Δ, B and C differ from position to position, and that is
        the selection: what the model sees decides what it writes, reads and forgets.

        Args:
            x_ble: the convolved input, (b, l, e).

        Returns:
            y, (b, l, e), in the type of `x_ble`.
        """
        # A, D, Δ and the state are float32 whatever the weights are stored in: a recurrence
        # carries its rounding errors along the whole sequence.
        A_en = -torch.exp(self.A_log.float())
        dt_blr, B_bln, C_bln = self.x_proj(x_ble).split([self.r, self.n, self.n], dim=-1)
        # Δ = softplus(bias + projection): how long, in the sense of eq. 1, this step lasts.
        dt_ble = F.linear(dt_blr, self.dt_proj.weight)
        delta_ble = F.softplus(dt_ble.float() + self.dt_proj.bias.float())
        y_ble = self.selective_scan(x_ble.float(), delta_ble, A_en, B_bln.float(), C_bln.float())
        return (y_ble + self.D.float() * x_ble.float()).to(x_ble.dtype)

    def selective_scan(
        self, x_ble: Tensor, delta_ble: Tensor, A_en: Tensor, B_bln: Tensor, C_bln: Tensor
    ) -> Tensor:
        """Discretize the system and run its recurrence.

        In continuous time, h'(t) = A h(t) + B x(t) and y(t) = C h(t) (eq. 1). When x is held for
        a time Δ, that becomes h_t = Ā h_{t-1} + B̄ x_t and y_t = C h_t (eq. 2). If Ā, B̄ and C
        were constant, y would be a convolution of x (eq. 3), which is how earlier models computed
        it. Here they change at every position, and only the recurrence is left.

        Args:
            x_ble: what is written, (b, l, e).
            delta_ble: how long each step lasts, positive, (b, l, e).
            A_en: how each number of the state decays, negative, (e, n).
            B_bln: where in the state x is written, (b, l, n).
            C_bln: from where in the state y is read, (b, l, n).

        Returns:
            y, (b, l, e).
        """
        # Eq. 4, zero-order hold: Ā = exp(Δ A), entry by entry because A is diagonal.
        A_bar_blen = torch.exp(torch.einsum("ble,en->blen", delta_ble, A_en))
        # For B̄, eq. 4 has a zero-order hold too. The authors' code takes its first-order part,
        # B̄ = Δ B, and so do all models trained with it.
        B_bar_x_blen = torch.einsum("ble,bln,ble->blen", delta_ble, B_bln, x_ble)

        state_ben = x_ble.new_zeros(x_ble.shape[0], *A_en.shape)
        y = []
        for t in range(x_ble.shape[1]):
            state_ben = A_bar_blen[:, t] * state_ben + B_bar_x_blen[:, t]  # eq. 2a
            y.append(torch.einsum("ben,bn->be", state_ben, C_bln[:, t]))  # eq. 2b
        return torch.stack(y, dim=1) if y else torch.zeros_like(x_ble)


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale by a learned weight (arXiv 1910.07467).

    Args:
        width: size of the last axis.
        eps: added to the mean square, so that zeros stay zeros.

    >>> norm = RMSNorm(2, eps=0.0)
    >>> [round(x, 4) for x in norm(torch.tensor([3.0, 4.0])).tolist()]
    [0.8485, 1.1314]
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to the same, computed in float32, returned in the type of the weight."""
        hidden = hidden.float()
        rms = torch.sqrt(hidden.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (hidden / rms).to(self.weight.dtype)


def main() -> None:
    """Feed random tokens to a small model and print the shape of its answer."""
    model = Mamba(ModelArgs(d_model=128, n_layer=2, vocab_size=32_000))
    with torch.no_grad():
        print(model(torch.randint(32_000, (2, 200))).shape)


if __name__ == "__main__":
    main()
