"""What Transformers' small random models compute, written to a file: with the drop-in or without.

python tests/dropin/transformers_models.py [--dropin] FILE
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import anymamba.dropin

if __name__ == "__main__" and "--dropin" in sys.argv:  # models look at import time
    anymamba.dropin.install()

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from anymamba import _core
from anymamba.dropin import mixer_steps

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # The usual 0.02 makes logits so even that a wrong one would look right.
    "initializer_range": 0.2,
}
MAMBA_1 = COMMON | {"num_hidden_layers": 2, "state_size": 8, "time_step_rank": 5}
MAMBA_2 = {
    "num_hidden_layers": 2,
    "state_size": 16,
    "head_dim": 12,
    "num_heads": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
# Layer 1 is attention, and layers 0 and 2 have experts.
JAMBA = {
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 0,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 5,
}
# The hybrids with Mamba-2's layers: beside them attention, which layer 1 is, experts and MLPs.
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 16}
HYBRID = COMMON | ATTENTION | HEADS | {"num_hidden_layers": 3, "mamba_chunk_size": 8}
LAYERS = ["linear_attention", "full_attention", "linear_attention"]
ZAMBA2 = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    "n_mamba_heads": 8,
    "mamba_ngroups": 2,
    "mamba_d_state": 16,
    "chunk_size": 8,
    "adapter_rank": 4,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention"],
    "head_dim": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 10,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "use_bias": True,
    "n_routed_experts": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
GRANITE = {
    "layer_types": LAYERS,
    "mamba_proj_bias": True,
    "num_local_experts": 3,
    "shared_intermediate_size": 32,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
}
# Attention and Mamba-2 side by side in every layer, whose products are scaled.
FALCON_H1 = {
    "num_hidden_layers": 2,
    "mamba_d_ssm": 96,
    "mamba_proj_bias": True,
    "ssm_multipliers": [0.5, 1.5, 0.75, 1.25, 2.0],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.5,
    "key_multiplier": 0.5,
}
NORMED = {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
CONFIGS = {
    "Mamba": transformers.MambaConfig(**MAMBA_1, use_bias=True),
    "Mamba2": transformers.Mamba2Config(**COMMON, **MAMBA_2),
    "FalconMamba": transformers.FalconMambaConfig(**MAMBA_1),
    "Jamba": transformers.JambaConfig(**COMMON, **JAMBA),
    "Bamba": transformers.BambaConfig(**HYBRID, attn_layer_indices=[1]),
    "Zamba2": transformers.Zamba2Config(**COMMON, **ZAMBA2),
    "NemotronH": transformers.NemotronHConfig(**COMMON, **ATTENTION, **NEMOTRON_H),
    "GraniteMoeHybrid": transformers.GraniteMoeHybridConfig(**HYBRID | GRANITE),
    "FalconH1": transformers.FalconH1Config(**HYBRID | FALCON_H1),
    "FalconH1 with norms": transformers.FalconH1Config(**HYBRID | FALCON_H1 | NORMED),
}
NEW_TOKENS = 12


calls: Counter[tuple[str, str]] = Counter()
"""How often which of the core's functions was called meanwhile, by what was done."""

_doing = ""


@contextmanager
def counting(what: str) -> Iterator[None]:
    """Count calls as those of a kind of work."""
    global _doing
    _doing = what
    try:
        yield
    finally:
        _doing = ""


def count_native_calls() -> None:
    """Count the calls of the core's operators, and of whole mixers' steps."""
    operators = [name for name in dir(_core) if name.startswith(("conv", "scan", "ssd"))]
    operators.remove("scan_checkpoint_floats")  # a size
    places = [*((_core, name) for name in operators), (mixer_steps.Table, "step")]
    for owner, name in places:

        def counted(*args: object, own: object = getattr(owner, name), name: str = name) -> object:
            if _doing:
                calls[_doing, name] += 1
            return own(*args)

        setattr(owner, name, counted)


def main() -> None:
    """Run all models, and write what they give."""
    count_native_calls()
    found = {}
    for name in CONFIGS:
        calls.clear()
        found[name] = observed(name)
        found[name] |= {f"calls in {what} of {f}": n for (what, f), n in calls.items()}
    torch.save(found, sys.argv[-1])


def model_of(name: str) -> PreTrainedModel:
    """A model whose weights depend on its name alone, none of which is zero."""
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{name.split()[0]}ForCausalLM")(CONFIGS[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def observed(name: str) -> dict[str, Tensor]:
    """Logits, gradients and generated tokens of one model, under their names."""
    model = model_of(name).eval()
    ids_bl = torch.randint(2, COMMON["vocab_size"], (2, 21))
    padded = torch.ones_like(ids_bl)
    padded[0, :5] = 0
    with torch.no_grad():
        with counting("prefill"):
            found = {"logits": model(ids_bl).logits}
        found |= {
            "logits of one token": model(ids_bl[:, :1]).logits,
            "logits beside padding": model(ids_bl, attention_mask=padded).logits,
        }
        half = model_of(name).eval().bfloat16()
        found["logits in bfloat16"] = half(ids_bl).logits
        found["logits of the same weights"] = half.float()(ids_bl).logits
    with counting("generation"):
        found |= generated(model, "", ids_bl, torch.ones_like(ids_bl))
    found |= generated(model, " after padding", ids_bl, padded)
    found |= gradients(model, "evaluation", ids_bl)
    if name == "FalconMamba":
        train_as_the_kernels_do(model)
    with counting("training"):
        return found | gradients(model.train(), "training", ids_bl)


def gradients(model: PreTrainedModel, mode: str, ids_bl: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients, large enough for an absolute tolerance to mean something."""
    loss = 100 * model(ids_bl, labels=ids_bl, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    grads = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    found = {f"gradient in {mode} of {name}": grad for name, grad in grads.items()}
    return found | {f"loss in {mode}": loss.detach()}


def train_as_the_kernels_do(model: PreTrainedModel) -> None:
    """Let the model's PyTorch code normalize the step where the kernels do, after its projection.

    In training Transformers' FalconMamba calls `mamba_inner_fn`, which is defined so; its PyTorch
    code, and its kernels in evaluation, normalize before the projection. The two differ on GPUs
    as well. Where the kernels' function runs, nothing that is changed here is called.
    """
    code = sys.modules[type(model).__module__]
    scan = code.mamba_selective_scan

    def scan_of_normalized(x_bel: Tensor, delta_bel: Tensor, *args: object, **kwargs: object):
        mean_of_squares = delta_bel.square().mean(dim=1, keepdim=True)
        eps = model.config.mixer_rms_eps
        return scan(x_bel, delta_bel * torch.rsqrt(mean_of_squares + eps), *args, **kwargs)

    code.mamba_selective_scan = scan_of_normalized
    for layer in model.backbone.layers:
        layer.mixer.dt_layernorm = torch.nn.Identity()
        layer.mixer.dt_layernorm.weight = torch.ones(layer.mixer.intermediate_size)


def generated(
    model: PreTrainedModel, how: str, ids_bl: Tensor, attention_mask: Tensor
) -> dict[str, Tensor]:
    """Greedy text, and the logits that decided it."""
    out = model.generate(
        ids_bl,
        attention_mask=attention_mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(out.logits, dim=1)
    return {f"tokens generated{how}": out.sequences, f"logits of generation{how}": logits}


if __name__ == "__main__":
    main()
