"""Small models in PyTorch with random weights, none of them zero."""

from typing import Any

import torch
from torch import Tensor, nn

from anymamba import MambaConfig, MambaForCausalLM


def small_model(seed: int = 0, **fields: Any) -> MambaForCausalLM:
    """Two layers, width 24, 61 words, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
    model = MambaForCausalLM(MambaConfig(**(sizes | fields)))
    for name, weight in model.named_parameters():
        # Biases start at zero, where a leak through a masked position could hide.
        if name.endswith("bias") and "dt_proj" not in name:
            nn.init.normal_(weight, std=0.5)
    return model.eval()


def talkative_model(**fields: Any) -> MambaForCausalLM:
    """A small model whose greedy text varies and hangs on all that was read: an untied head."""
    model = small_model(tie_word_embeddings=False, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def words(b: int, l: int, seed: int = 1) -> Tensor:
    """(b, l) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (b, l), generator=generator)


def hidden(b: int = 2, l: int = 7, d: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    """(b, l, d) inputs of a layer, always the same."""
    return torch.randn(b, l, d, generator=torch.Generator().manual_seed(1)).to(dtype)


def unhidden(module: nn.Module, seed: int = 0) -> Any:
    """Every weight that starts at zero or one, or the same for all, becomes random."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            if name.endswith(("D", "norm.weight", "bias", "A_log", "init_states")):
                weight.add_(0.3 * noise)
            elif name.endswith("conv1d.weight"):
                weight.copy_(0.5 * noise)
    return module


def lively_model(seed: int = 0, **fields: Any) -> MambaForCausalLM:
    """A small model in which every weight counts: states that keep much and move much."""
    model = small_model(seed, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.backbone.layers:
            mixer = block.mixer
            mixer.dt_proj.bias.normal_(generator=generator)
            mixer.D.normal_(generator=generator)
            mixer.A_log.uniform_(-1, 1, generator=generator)
            for weight in (mixer.x_proj.weight, mixer.dt_proj.weight, mixer.conv1d.weight):
                weight.mul_(3)
            block.norm.weight.normal_(1, 0.3, generator=generator)
        model.backbone.norm_f.weight.normal_(1, 0.3, generator=generator)
    return model
