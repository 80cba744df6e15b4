"""What Transformers' small random models compute, written to a file: with the drop-in or without.

python tests/dropin/transformers_models.py [--dropin] FILE
"""

import sys

import anymamba.dropin

if __name__ == "__main__" and "--dropin" in sys.argv:  # models look at import time
    anymamba.dropin.install()

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

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
CONFIGS = {
    "Mamba": transformers.MambaConfig(**MAMBA_1, use_bias=True),
    "Mamba2": transformers.Mamba2Config(**COMMON, **MAMBA_2),
    "FalconMamba": transformers.FalconMambaConfig(**MAMBA_1),
    "Jamba": transformers.JambaConfig(**COMMON, **JAMBA),
}
NEW_TOKENS = 12


def main() -> None:
    """Run all models, and write what they give."""
    torch.save({name: observed(name) for name in CONFIGS}, sys.argv[-1])


def model_of(name: str) -> PreTrainedModel:
    """A model whose weights depend on its name alone, none of which is zero."""
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(CONFIGS[name])
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
        found = {
            "logits": model(ids_bl).logits,
            "logits of one token": model(ids_bl[:, :1]).logits,
            "logits beside padding": model(ids_bl, attention_mask=padded).logits,
        }
        if name != "Jamba":  # whose logits in bfloat16 are 8 % off those in float32, on either side
            found["logits in bfloat16"] = model_of(name).eval().bfloat16()(ids_bl).logits
    found |= generated(model, "", ids_bl, torch.ones_like(ids_bl))
    found |= generated(model, " after padding", ids_bl, padded)
    found |= gradients(model, "evaluation", ids_bl)
    if name == "FalconMamba":
        train_as_the_kernels_do(model)
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
