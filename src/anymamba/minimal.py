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

The file needs PyTorch alone and can be copied; `Mamba.from_pretrained` needs huggingface_hub and
safetensors too. Run it with `python -m anymamba.minimal`.
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

__all__ = ["Mamba", "MambaBlock", "ModelArgs", "RMSNorm", "ResidualBlock"]


@dataclass
class ModelArgs:
    """The shape of a model (sections 3.4 and 3.6 of the paper).

    Args:
        d_model: width of the residual stream, d.
        n_layer: number of residual blocks.
        vocab_size: number of tokens; rounded up to a multiple of `pad_vocab_size_multiple`.
        d_state: numbers that each channel remembers, n.
        expand: inner width as a multiple of the model width, e = int(expand * d).
        dt_rank: rank r of the projection that makes the step size; 'auto' is ceil(d / 16).
        d_conv: width of the causal convolution, k.
        pad_vocab_size_multiple: what the vocabulary is rounded up to.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections into and out of a block have one.

    Raises:
        ValueError: a value makes no sense; the message names field and value.

    >>> args = ModelArgs(d_model=40, n_layer=2, vocab_size=1001)
    >>> args.d_inner, args.dt_rank, args.vocab_size
    (80, 3, 1008)
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    expand: float = 2
    dt_rank: int | str = "auto"
    d_conv: int = 4
    pad_vocab_size_multiple: int = 8
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("conv_bias", "bias"):
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be True or False, got {value!r}")
            elif name == "expand":
                if type(value) not in (int, float) or not 1 <= value * self.d_model < math.inf:
                    raise ValueError(f"expand must be a number of at least 1 / d, got {value!r}")
            elif (name, value) == ("dt_rank", "auto"):
                self.dt_rank = math.ceil(self.d_model / 16)  # fields come in order: d_model is fine
            elif type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple

    @property
    def d_inner(self) -> int:
        """The inner width e of a block."""
        return int(self.expand * self.d_model)


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
            ValueError: `input_ids_bl` does not have two axes.
        """
        if input_ids_bl.dim() != 2:
            shape = tuple(input_ids_bl.shape)
            raise ValueError(f"input_ids must have shape (batch, length), got {shape}")
        # Every block adds to this stream; kept in float32, many small additions are not lost.
        hidden_bld = self.embedding(input_ids_bl).float()
        for layer in self.layers:
            hidden_bld = layer(hidden_bld)
        logits_blv: Tensor = self.lm_head(self.norm_f(hidden_bld))
        return logits_blv.float()

    @staticmethod
    def from_pretrained(name: str | Path) -> Mamba:
        """Load a checkpoint in the authors' original layout, in Transformers', or in this file's.

        Args:
            name: a folder, or an id on the Hugging Face hub such as 'state-spaces/mamba-130m' or
                'state-spaces/mamba-130m-hf'.

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
        model, weights = Mamba(args_of(config)), tensors_in(folder)
        if not config.get("tie_word_embeddings", config.get("tie_embeddings", True)):
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.embedding.weight))
        elif "embedding.weight" in weights:
            head = weights.setdefault("lm_head.weight", weights["embedding.weight"])
            if not torch.equal(head, weights["embedding.weight"]):
                raise ValueError("the head is tied in config.json, but stored with other values")
        model.load_state_dict(weights)
        return model


class ResidualBlock(nn.Module):
    """The unit that repeats: hidden + mixer(norm(hidden)), (b, l, d) to (b, l, d).

    The authors' code orders the same sum as Add -> Norm -> Mamba: each block gets the last one's
    output and the stream apart and adds them first, so that one kernel can add and norm.

    Args:
        args: the shape of the model.

    >>> block = ResidualBlock(ModelArgs(d_model=32, n_layer=1, vocab_size=64))
    >>> block(torch.zeros(1, 3, 32)).shape
    torch.Size([1, 3, 32])
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
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
        self.args = args
        d, e, n, r, k = args.d_model, args.d_inner, args.d_state, int(args.dt_rank), args.d_conv
        self.in_proj = nn.Linear(d, 2 * e, bias=args.bias)
        # One filter a channel. The padding makes it causal: of its l + k - 1 outputs, the first l
        # have seen no later input.
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=args.conv_bias)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = StepSizeProjection(r, e)
        self.out_proj = nn.Linear(e, d, bias=args.bias)

        # S4D-real (section 3.6): A = -1, -2, ..., -n, so a channel forgets at n different rates.
        # Its logarithm is learned: A = -exp(A_log) stays negative, and the state cannot blow up.
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(e, 1))  # (e, n)
        self.D = nn.Parameter(torch.ones(e))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(args.n_layer)  # depth does not swell the stream

    def forward(self, hidden_bld: Tensor) -> Tensor:
        """(b, l, d) to (b, l, d); no position sees a later one."""
        length = hidden_bld.shape[1]
        if length == 0:
            return hidden_bld  # nn.Conv1d refuses what it has no position of
        x_ble, z_ble = self.in_proj(hidden_bld).chunk(2, dim=-1)
        x_bel = self.conv1d(x_ble.transpose(1, 2))[:, :, :length]
        y_ble = self.ssm(F.silu(x_bel.transpose(1, 2)))
        mixed_bld: Tensor = self.out_proj(y_ble * F.silu(z_ble))
        return mixed_bld

    def ssm(self, x_ble: Tensor) -> Tensor:
        """The state space model that computes its own Δ, B and C from x: algorithm 2.

        A and D are the same everywhere. Δ, B and C differ from position to position, and that is
        the selection: what the model sees decides what it writes, reads and forgets.

        Args:
            x_ble: the convolved input, (b, l, e).

        Returns:
            y, (b, l, e), in the type of `x_ble`.
        """
        r, n = int(self.args.dt_rank), self.args.d_state
        # A, D, Δ and the state are float32 whatever the weights are stored in: a recurrence
        # carries its rounding errors along the whole sequence.
        A_en = -torch.exp(self.A_log.float())
        dt_blr, B_bln, C_bln = self.x_proj(x_ble).split([r, n, n], dim=-1)
        # Δ = softplus(bias + projection): how long, in the sense of eq. 1, this step lasts.
        delta_ble = F.softplus(self.dt_proj(dt_blr))
        y_ble = self.selective_scan(
            x_ble.float(), delta_ble, A_en, B_bln.float(), C_bln.float(), self.D.float()
        )
        return y_ble.to(x_ble.dtype)

    def selective_scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        """Discretize the system and run its recurrence.

        In continuous time, h'(t) = A h(t) + B u(t) and y(t) = C h(t) (eq. 1). When u is held for
        a time Δ, that becomes h_t = Ā h_{t-1} + B̄ u_t and y_t = C h_t (eq. 2). If Ā, B̄ and C
        were constant, y would be a convolution of u (eq. 3), which is how earlier models computed
        it. Here they change at every position, and only the recurrence is left.

        The loop over positions is sequential. The authors' CUDA kernel computes the same as a
        parallel scan: a step h -> Ā h + B̄ u is a pair (Ā, B̄ u), two steps in a row are again such
        a pair, (Ā₂ Ā₁, Ā₂ B̄₁ u₁ + B̄₂ u₂), and so all of them can be joined in a tree.

        Args:
            u: what is written, (b, l, e).
            delta: Δ, how long each step lasts, positive, (b, l, e).
            A: how each number of the state decays, negative, (e, n).
            B: where in the state u is written, (b, l, n).
            C: from where in the state y is read, (b, l, n).
            D: how much of u passes by the state, (e,).

        Returns:
            y, (b, l, e).
        """
        # Eq. 4, zero-order hold: Ā = exp(Δ A), entry by entry because A is diagonal.
        A_bar_blen = torch.exp(torch.einsum("ble,en->blen", delta, A))
        # For B̄, eq. 4 has a zero-order hold too. The authors' code takes its first-order part,
        # B̄ = Δ B, and so do all models trained with it.
        B_bar_u_blen = torch.einsum("ble,bln,ble->blen", delta, B, u)

        state_ben = u.new_zeros(u.shape[0], *A.shape)
        y = []
        for t in range(u.shape[1]):
            state_ben = A_bar_blen[:, t] * state_ben + B_bar_u_blen[:, t]  # eq. 2a
            y.append(torch.einsum("ben,bn->be", state_ben, C[:, t]))  # eq. 2b
        y_ble = torch.stack(y, dim=1) if y else torch.zeros_like(u)
        return y_ble + D * u


class StepSizeProjection(nn.Linear):
    """(b, l, r) to (b, l, e): what softplus turns into Δ, with the bias added in float32.

    Args:
        rank: r, the size of the input's last axis.
        d_inner: e, the size of the output's.

    >>> StepSizeProjection(3, 8)(torch.zeros(1, 2, 3)).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, rank: int, d_inner: int) -> None:
        super().__init__(rank, d_inner)
        # Step sizes start between 0.001 and 0.1, spread evenly on a log scale. The bias is what
        # softplus turns into them; the weight makes them depend on the input.
        delta_e = torch.empty(d_inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            self.bias.copy_(delta_e + torch.log(-torch.expm1(-delta_e)))  # softplus⁻¹
            self.weight.uniform_(-(rank**-0.5), rank**-0.5)

    def forward(self, dt_blr: Tensor) -> Tensor:
        return F.linear(dt_blr, self.weight).float() + self.bias.float()


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale by a learned weight (arXiv 1910.07467).

    Args:
        d_model: size of the last axis.
        eps: added to the mean square, so that zeros stay zeros.

    >>> norm = RMSNorm(2, eps=0.0)
    >>> [round(x, 4) for x in norm(torch.tensor([3.0, 4.0])).tolist()]
    [0.8485, 1.1314]
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) to the same, computed in float32, returned in the type of the weight."""
        hidden = hidden.float()
        rms = torch.sqrt(hidden.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (hidden / rms).to(self.weight.dtype)


def args_of(config: dict[str, Any]) -> ModelArgs:
    """The shape that a config.json describes, in Transformers' names, the original's or these.

    >>> args_of({"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50}).d_inner
    64
    """
    fields = config | (config.get("ssm_cfg") or {})  # the original keeps a block's fields apart
    activation, eps = config.get("hidden_act", "silu"), config.get("layer_norm_epsilon", 1e-5)
    kind = config.get("model_type", "mamba"), fields.get("layer", "Mamba1")
    usual = kind == ("mamba", "Mamba1") and activation in ("silu", "swish") and eps == 1e-5
    if not usual or config.get("attn_layer_idx"):
        raise ValueError("config.json must describe a Mamba-1 with silu and an epsilon of 1e-5")
    if "hidden_size" in config:
        renamed = {
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layer",
            "state_size": "d_state",
            "time_step_rank": "dt_rank",
            "conv_kernel": "d_conv",
            "use_conv_bias": "conv_bias",
            "use_bias": "bias",
        }
        fields = {renamed.get(name, name): value for name, value in config.items()}
        fields["pad_vocab_size_multiple"] = 1
    return ModelArgs(**{n: v for n, v in fields.items() if n in ModelArgs.__dataclass_fields__})


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by their names here: layouts differ in a prefix and in one name."""
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


def main() -> None:
    """Feed random tokens to a small model and print the shape of its answer."""
    model = Mamba(ModelArgs(d_model=128, n_layer=2, vocab_size=32_000))
    with torch.no_grad():
        print(model(torch.randint(32_000, (2, 200))).shape)


if __name__ == "__main__":
    main()
