"""Mamba-2 in one file: the specification that every faster path in this package is tested against.

The model is that of 'Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality' (Dao and Gu, arXiv 2405.21060), whose equations are quoted beside
the lines that compute them. Two functions compute the same state space model: `recurrence`, one
position after the other, and `chunked`, the paper's four steps, which are matrix products.
`Mamba2Block` puts a convolution before it and a gated norm behind it; `ResidualBlock` and `Mamba2`
stack such blocks between an embedding and a vocabulary. `anymamba.minimal` is the first Mamba.

A tensor's name ends in its shape, one letter an axis:

    b  batch             d  model width           h  heads              n  state size
    l  sequence length   e  inner width, h p      p  width of a head    g  groups of heads
    v  vocabulary        k  convolution width     c  chunks             q, s  positions of a chunk

The file needs PyTorch alone and can be copied; `Mamba2.from_pretrained` needs huggingface_hub and
safetensors too.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelArgs:
    """The shape of a model (section 7 of the paper).

    Args:
        d_model: width of the residual stream, d.
        n_layer: number of residual blocks.
        vocab_size: number of tokens; rounded up to a multiple of `pad_vocab_size_multiple`.
        d_state: numbers that each channel remembers, n.
        expand: inner width as a multiple of the model width, e = expand * d.
        headdim: width of a head, p; e is a multiple of it, and h = e / p.
        ngroups: how many groups the heads form, g; a group shares B and C, and divides h.
        d_conv: width of the causal convolution, k.
        chunk_size: positions that one matrix product takes together. Results do not depend on it.
        dt_limit: the least and the largest step size.
        rmsnorm: whether a block has a norm beside its gate.
        norm_before_gate: whether the norm comes before the gate rather than after it.
        pad_vocab_size_multiple: what the vocabulary is rounded up to.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections into and out of a block have one.
        eps: of every norm.

    Raises:
        ValueError: the heads do not fit the inner width, or the groups the heads.

    >>> args = ModelArgs(d_model=64, n_layer=2, vocab_size=1001, headdim=16)
    >>> args.d_inner, args.nheads, args.d_conv_channels, args.vocab_size
    (128, 8, 384, 1008)
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 128
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    d_conv: int = 4
    chunk_size: int = 256
    dt_limit: tuple[float, float] = (0.0, math.inf)
    rmsnorm: bool = True
    norm_before_gate: bool = False
    pad_vocab_size_multiple: int = 16
    conv_bias: bool = True
    bias: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.dt_limit = (float(self.dt_limit[0]), float(self.dt_limit[1]))
        if self.d_inner % self.headdim:
            raise ValueError(f"headdim is {self.headdim}, expected a divisor of e={self.d_inner}")
        if self.nheads % self.ngroups:
            raise ValueError(f"ngroups is {self.ngroups}, expected a divisor of h={self.nheads}")
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple

    @property
    def d_inner(self) -> int:
        """The inner width e of a block."""
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        """The number of heads, h."""
        return self.d_inner // self.headdim

    @property
    def d_conv_channels(self) -> int:
        """The channels that the convolution sees: x, B and C, e + 2 g n."""
        return self.d_inner + 2 * self.ngroups * self.d_state


class Mamba2(nn.Module):
    """A language model: embedding, residual blocks, norm, and the embedding again as the head.

    Args:
        args: the shape of the model.

    >>> model = Mamba2(ModelArgs(d_model=32, n_layer=1, vocab_size=64, d_state=8, headdim=16))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.embedding = nn.Embedding(args.vocab_size, args.d_model)
        self.layers = nn.ModuleList([ResidualBlock(args) for _ in range(args.n_layer)])
        self.norm_f = RMSNorm(args.d_model, args.eps)
        self.lm_head = nn.Linear(args.d_model, args.vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight  # tied: one matrix reads and writes tokens
        nn.init.normal_(self.embedding.weight, std=0.02)  # as a head, it must start small

    def forward(self, input_ids_bl: Tensor) -> Tensor:
        """Score every token as the one that follows, at each position.

        Args:
            input_ids_bl: token numbers, (b, l).

        Returns:
            Logits, (b, l, v), float32 whatever the weights are stored in.
        """
        hidden_bld = self.embedding(input_ids_bl).float()  # many small additions are not lost
        for layer in self.layers:
            hidden_bld = layer(hidden_bld)
        logits_blv: Tensor = self.lm_head(self.norm_f(hidden_bld))
        return logits_blv.float()

    @staticmethod
    def from_pretrained(name: str | Path) -> Mamba2:
        """Load a checkpoint in the authors' original layout, or in Transformers'.

        Args:
            name: a folder, or an id on the Hugging Face hub such as 'state-spaces/mamba2-130m'.

        Returns:
            The model in float32.

        Raises:
            ValueError: the config describes a model that this file does not have.
            RuntimeError: the file lacks a tensor, or has one of another name or shape.
        """
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            patterns = ["config.json", "model*.safetensors", "pytorch_model*.bin"]
            folder = Path(snapshot_download(str(name), allow_patterns=patterns))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model, weights = Mamba2(args_of(config)), tensors_in(folder)
        # Transformers' Mamba-2 has a head of its own unless its config says otherwise.
        tied = config.get("tie_word_embeddings", "hidden_size" not in config)
        if not config.get("tie_embeddings", tied):
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.embedding.weight))
        else:
            weights.setdefault("lm_head.weight", weights["embedding.weight"])
        model.load_state_dict(weights)
        return model


class ResidualBlock(nn.Module):
    """The unit that repeats: hidden + mixer(norm(hidden)), (b, l, d) to (b, l, d)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.mixer = Mamba2Block(args)
        self.norm = RMSNorm(args.d_model, args.eps)

    def forward(self, hidden_bld: Tensor) -> Tensor:
        mixed_bld: Tensor = self.mixer(self.norm(hidden_bld))
        return hidden_bld + mixed_bld


class Mamba2Block(nn.Module):
    """A state space model with heads between two projections (figure 6 of the paper, right).

    All that it reads, x, B, C, the step size and the gate z, is made in one projection at its
    start; in Mamba, B, C and the step size are made of x.

    Args:
        args: the shape of the model.

    >>> block = Mamba2Block(ModelArgs(d_model=32, n_layer=1, vocab_size=64, headdim=16))
    >>> block(torch.zeros(1, 3, 32)).shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        d, e, h, channels = args.d_model, args.d_inner, args.nheads, args.d_conv_channels
        self.in_proj = nn.Linear(d, e + channels + h, bias=args.bias)  # z; x, B, C; dt
        # One filter a channel; padded, its first l outputs have seen no later input.
        k = args.d_conv
        self.conv1d = nn.Conv1d(
            channels, channels, k, groups=channels, padding=k - 1, bias=args.conv_bias
        )
        # Step sizes, softplus of the bias, start between 0.001 and 0.1, evenly on a log scale.
        delta_h = torch.empty(h).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(delta_h + torch.log(-torch.expm1(-delta_h)))  # softplus⁻¹
        # One decay a head. Its logarithm is learned: A = -exp(A_log) stays negative.
        self.A_log = nn.Parameter(torch.empty(h).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(h))
        norm = (e, args.eps, args.ngroups, args.norm_before_gate)
        self.norm = RMSNorm(*norm) if args.rmsnorm else None
        self.out_proj = nn.Linear(e, d, bias=args.bias)

    def forward(self, hidden_bld: Tensor) -> Tensor:
        """(b, l, d) to (b, l, d); no position sees a later one."""
        args, length = self.args, hidden_bld.shape[1]
        sizes = [args.d_inner, args.d_conv_channels, args.nheads]
        z_ble, xBC, dt_blh = self.in_proj(hidden_bld).split(sizes, dim=-1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2))[:, :, :length].transpose(1, 2))
        y_ble = self.ssm(xBC, dt_blh)
        gated_ble = self.norm(y_ble, z_ble) if self.norm is not None else y_ble * F.silu(z_ble)
        mixed_bld: Tensor = self.out_proj(gated_ble)
        return mixed_bld

    def ssm(self, xBC: Tensor, dt_blh: Tensor) -> Tensor:
        """The state space model, of the convolved x, B and C and of the step sizes' logits.

        Args:
            xBC: (b, l, e + 2 g n).
            dt_blh: (b, l, h).

        Returns:
            y, (b, l, e), in the type of `xBC`.
        """
        args = self.args
        maps = args.ngroups * args.d_state
        x, B, C = torch.split(xBC.float(), [args.d_inner, maps, maps], dim=-1)
        x_blhp = x.view(*x.shape[:2], args.nheads, args.headdim)
        # Neighbouring heads of a group share its B and C.
        of_group = args.nheads // args.ngroups
        B_blhn, C_blhn = (
            t.view(*t.shape[:2], args.ngroups, args.d_state).repeat_interleave(of_group, dim=2)
            for t in (B, C)
        )
        # A, D, Δ and the state are float32 whatever the weights are stored in: a recurrence
        # carries its rounding errors along the whole sequence.
        delta_blh = F.softplus(dt_blh.float() + self.dt_bias.float()).clamp(*args.dt_limit)
        A_h = -torch.exp(self.A_log.float())
        y_blhp = chunked(x_blhp, delta_blh, A_h, B_blhn, C_blhn, args.chunk_size)
        y_blhp = y_blhp + self.D.float()[:, None] * x_blhp
        return y_blhp.flatten(2).to(xBC.dtype)


def recurrence(
    x_blhp: Tensor, delta_blh: Tensor, A_h: Tensor, B_blhn: Tensor, C_blhn: Tensor
) -> Tensor:
    """The state space model as it is defined: h_t = a_t h_{t-1} + B_t (Δ_t x_t), y_t = C_t h_t.

    Equation 1 of the paper, discretized as in Mamba. What makes it Mamba-2 is that a_t = exp(Δ_t A)
    is one number for all of a head's channels and states (section 5.1, 'scalar-identity').

    Args:
        x_blhp: what is written, (b, l, h, p).
        delta_blh: Δ, how long each step lasts, positive, (b, l, h).
        A_h: how each head's state decays, negative, (h,).
        B_blhn: where in the state x is written, (b, l, h, n).
        C_blhn: from where in the state y is read, (b, l, h, n).

    Returns:
        y, (b, l, h, p).

    >>> ones = torch.ones(1, 3, 1, 1)
    >>> recurrence(ones, ones[..., 0], torch.tensor([-math.log(2)]), ones, ones).flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    a_blh = torch.exp(delta_blh * A_h)
    written_blhp = delta_blh[..., None] * x_blhp
    b, length, h, p = x_blhp.shape
    state_bhpn = x_blhp.new_zeros(b, h, p, B_blhn.shape[-1])
    y = []
    for t in range(length):
        update_bhpn = torch.einsum("bhp,bhn->bhpn", written_blhp[:, t], B_blhn[:, t])
        state_bhpn = a_blh[:, t, :, None, None] * state_bhpn + update_bhpn
        y.append(torch.einsum("bhpn,bhn->bhp", state_bhpn, C_blhn[:, t]))
    return torch.stack(y, dim=1) if y else torch.zeros_like(x_blhp)


def chunked(
    x_blhp: Tensor, delta_blh: Tensor, A_h: Tensor, B_blhn: Tensor, C_blhn: Tensor, chunk_size: int
) -> Tensor:
    """The same by matrix products: the paper's algorithm for its state space duality (section 6).

    Unrolled, the recurrence is one matrix a head, y = M x, with (equation 3)

        M_ts = C_t · B_s  a_t a_{t-1} ... a_{s+1}  Δ_s     for s <= t, and 0 above the diagonal.

    That is attention with C as queries and B as keys, whose causal mask L holds the products of
    decays (equation 16): the 'duality'. Its cost grows with l². So the sequence is cut into chunks:
    blocks of M on the diagonal are computed so, and those below it, which have low rank, through
    the states at the chunks' borders.

    Args:
        chunk_size: q, the positions of a chunk; the others, and what is returned, as there.

    >>> x, delta = torch.randn(1, 7, 2, 3), torch.rand(1, 7, 2)
    >>> A, B, C = -torch.rand(2), torch.randn(1, 7, 2, 4), torch.randn(1, 7, 2, 4)
    >>> one_by_one = recurrence(x, delta, A, B, C)
    >>> torch.allclose(chunked(x, delta, A, B, C, chunk_size=3), one_by_one, atol=1e-5)
    True
    """
    length = x_blhp.shape[1]
    if length == 0:
        return torch.zeros_like(x_blhp)
    q = min(chunk_size, length)
    # Zeros behind the last position change nothing before them.
    x, delta, B, C = (_in_chunks(t, q) for t in (x_blhp, delta_blh, B_blhn, C_blhn))
    written_bcqhp = delta[..., None] * x
    log_a_bcqh = delta * A_h
    # The logarithm of all decays from a chunk's start to each of its positions.
    passed_bcqh = log_a_bcqh.cumsum(dim=2)

    # 1. Within a chunk: the blocks on the diagonal, as attention with the mask L.
    L_bchqs = torch.exp(_segment_sums(log_a_bcqh.movedim(3, 2)))
    scores_bchqs = torch.einsum("bcqhn,bcshn->bchqs", C, B)
    y_bcqhp = torch.einsum("bchqs,bcshp->bcqhp", L_bchqs * scores_bchqs, written_bcqhp)

    # 2. What each chunk alone leaves at its end (the right factors: B).
    to_end_bcqh = torch.exp(passed_bcqh[:, :, -1:] - passed_bcqh)
    left_bchpn = torch.einsum("bcqhn,bcqh,bcqhp->bchpn", B, to_end_bcqh, written_bcqhp)

    # 3. The states before each chunk, by the same recurrence in l / q steps (middle factors: A).
    through_bch = torch.exp(passed_bcqh[:, :, -1])
    state_bhpn = torch.zeros_like(left_bchpn[:, 0])
    before = []
    for c in range(left_bchpn.shape[1]):
        before.append(state_bhpn)
        state_bhpn = through_bch[:, c, :, None, None] * state_bhpn + left_bchpn[:, c]
    before_bchpn = torch.stack(before, dim=1)

    # 4. What a chunk's positions read of the state before it (the left factors: C).
    read_bcqhp = torch.einsum("bcqhn,bcqh,bchpn->bcqhp", C, torch.exp(passed_bcqh), before_bchpn)
    return (y_bcqhp + read_bcqhp).flatten(1, 2)[:, :length]


def _in_chunks(tensor: Tensor, q: int) -> Tensor:
    """(b, l, ...) as (b, c, q, ...), zeros behind the last position."""
    padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, -tensor.shape[1] % q))
    return padded.view(padded.shape[0], -1, q, *padded.shape[2:])


def _segment_sums(log_a: Tensor) -> Tensor:
    """(..., q) to (..., q, s): the sums over the positions s + 1 to q, and -inf above the diagonal.

    >>> _segment_sums(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [[0.0, -inf, -inf], [2.0, 0.0, -inf], [5.0, 3.0, 0.0]]
    """
    total = log_a.cumsum(dim=-1)
    above = torch.ones(log_a.shape[-1], log_a.shape[-1], device=log_a.device).triu(1).bool()
    return (total[..., :, None] - total[..., None, :]).masked_fill(above, -torch.inf)


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale by a learned weight (arXiv 1910.07467).

    In a block it has a gate z, and norms each group's channels by themselves: norm(y silu(z)), or
    norm(y) silu(z).

    Args:
        width: size of the last axis.
        eps: added to the mean square, so that zeros stay zeros.
        ngroups: g; each width / g neighbouring channels are normed by themselves.
        norm_before_gate: whether the gate multiplies what was normed, rather than what is.

    >>> norm, gate = RMSNorm(2, 0.0, norm_before_gate=True), torch.full((2,), 100.0)
    >>> [round(x, 2) for x in norm(torch.tensor([3.0, 4.0]), gate).tolist()]  # silu(100) is 100
    [84.85, 113.14]
    """

    def __init__(
        self, width: int, eps: float = 1e-5, ngroups: int = 1, norm_before_gate: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ngroups, self.norm_before_gate = eps, ngroups, norm_before_gate

    def forward(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """(..., width), twice with a gate, to the same; float32 inside, then the weight's type."""
        gate = torch.ones(()) if z is None else F.silu(z.float())
        y = y.float() if self.norm_before_gate else y.float() * gate
        groups = y.reshape(*y.shape[:-1], self.ngroups, -1)
        rms = torch.sqrt(groups.square().mean(dim=-1, keepdim=True) + self.eps)
        normed = (groups / rms).reshape(y.shape)
        gated = normed * gate if self.norm_before_gate else normed
        return self.weight * gated.to(self.weight.dtype)


def args_of(config: dict[str, Any]) -> ModelArgs:
    """The shape that a config.json describes, in Transformers' names or the original's.

    >>> layer = {"layer": "Mamba2", "headdim": 16}
    >>> args_of({"d_model": 32, "n_layer": 1, "vocab_size": 50, "ssm_cfg": layer}).nheads
    4
    """
    fields = config | (config.get("ssm_cfg") or {})  # the original keeps a block's fields apart
    kind = config.get("model_type") or fields.get("layer")
    plain = config.get("hidden_act", "silu") in ("silu", "swish")
    if kind not in ("mamba2", "Mamba2") or not plain or config.get("attn_layer_idx"):
        raise ValueError("config.json must describe a Mamba-2 with silu and without attention")
    if "hidden_size" in config:
        renamed = {
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layer",
            "state_size": "d_state",
            "head_dim": "headdim",
            "n_groups": "ngroups",
            "conv_kernel": "d_conv",
            "time_step_limit": "dt_limit",
            "layer_norm_epsilon": "eps",
            "use_conv_bias": "conv_bias",
            "use_bias": "bias",
            "use_gated_norm": "rmsnorm",
            "gate_after_norm": "norm_before_gate",
            "norm_before_gate": "",  # Transformers writes it and ignores it
        }
        fields = {renamed.get(n, n): v for n, v in config.items()} | {"pad_vocab_size_multiple": 1}
        limits = fields.get("dt_limit", (0, math.inf))  # JSON has no infinity, and writes an object
        fields["dt_limit"] = [v["__float__"] if isinstance(v, dict) else v for v in limits]
    return ModelArgs(**{n: v for n, v in fields.items() if n in ModelArgs.__dataclass_fields__})


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by their names here: layouts differ in a prefix and one name."""
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        from safetensors.torch import load_file

        shards = [load_file(file) for file in files]
    else:  # pickles; weights_only refuses those that would run code
        files = sorted(folder.glob("pytorch_model*.bin"))
        shards = [torch.load(file, "cpu", weights_only=True) for file in files]
    return {
        name.removeprefix("backbone.").replace("embeddings.", "embedding."): tensor
        for shard in shards
        for name, tensor in shard.items()
    }
