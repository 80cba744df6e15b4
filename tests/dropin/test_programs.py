"""Programs as the originals' users write them run unchanged under `anymamba run`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from tests.support import processes
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

CUDA_ON_CPU = "anymamba: no CUDA here: what this program puts there is on the CPU\n"

LAYER = """
import torch
from mamba_ssm import {name}

torch.manual_seed(0)
batch, length, dim = 2, 64, 64
x = torch.randn(batch, length, dim).to("cuda")
model = {name}(d_model=dim, d_state=16, d_conv=4, expand=2, {more}).to("cuda")
y = model(x)
assert y.shape == x.shape
y.square().mean().backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
print("ran", type(model).__module__)
"""

GENERATE = """
import argparse, json, time
import torch
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

parser = argparse.ArgumentParser(description="Generation benchmarking")
parser.add_argument("--model-name", type=str)
parser.add_argument("--promptlen", type=int, default=5)
parser.add_argument("--genlen", type=int, default=12)
args = parser.parse_args()

device, dtype = "cuda", torch.float32
model = MambaLMHeadModel.from_pretrained(args.model_name, device=device, dtype=dtype)
model.eval()
torch.random.manual_seed(0)
input_ids = torch.randint(1, 20, (2, args.promptlen), dtype=torch.long, device=device)
torch.cuda.synchronize()
start = time.time()
out = model.generate(
    input_ids=input_ids,
    max_length=args.promptlen + args.genlen,
    cg=True,
    return_dict_in_generate=True,
    output_scores=True,
    enable_timing=False,
    top_k=1,
)
torch.cuda.synchronize()
print(json.dumps([input_ids.tolist(), out.sequences.tolist(), len(out.scores)]))
"""

OPERATORS = """
import torch
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.layer_norm import RMSNorm, rms_norm_fn

x = torch.randn(2, 8, 10, device="cuda", requires_grad=True)
u = causal_conv1d_fn(x, torch.randn(8, 4, device="cuda"), activation="silu")
A = -torch.rand(8, 4, device="cuda")
B, C = torch.randn(2, 2, 4, 10, device="cuda")
y, last = selective_scan_fn(u, u, A, B, C, delta_softplus=True, return_last_state=True)
assert y.shape == x.shape and last.shape == (2, 8, 4)
RMSNorm(10, device="cuda")(y).sum().backward()
print("ran", x.grad.isfinite().all().item())
"""


def run(warm: Warm, program: str, folder: Path, *arguments: str) -> str:
    (folder / "program.py").write_text(program)
    done = processes.run(warm.python, "-m", "anymamba", "run", "program.py", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        # More is said of CUDA graphs, which the program of generation asks for.
        assert done.stderr.startswith(CUDA_ON_CPU)
        assert done.stderr.count("\n") == 1 or "CUDA graphs" in done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "more"), [("Mamba", ""), ("Mamba2", "headdim=32")])
def test_the_layers_of_the_originals_readme(
    name: str, more: str, warm: Warm, tmp_path: Path
) -> None:
    program = LAYER.format(name=name, more=more)
    assert run(warm, program, tmp_path).startswith("ran anymamba.dropin.mamba_ssm.modules.")


def test_operators_by_themselves(warm: Warm, tmp_path: Path) -> None:
    assert run(warm, OPERATORS, tmp_path) == "ran True\n"


def mamba() -> tuple[Any, dict[str, Any]]:
    """Transformers' model, and what the original's configuration says of such a one."""
    config = MambaConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, state_size=8, time_step_rank=1
    )
    return MambaForCausalLM(config), {"d_state": 8}


def mamba2() -> tuple[Any, dict[str, Any]]:
    """The same for Mamba-2."""
    config = Mamba2Config(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=8,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
        tie_word_embeddings=True,
    )
    layer = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 4}
    return Mamba2ForCausalLM(config), layer


@pytest.mark.parametrize("kind", [mamba, mamba2])
def test_a_language_model_generates_from_a_checkpoint_of_the_original(
    kind: Any, tmp_path: Path, warm: Warm
) -> None:
    torch.manual_seed(0)
    model, layer = kind()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than at the beginning of training, so that the likeliest token has no rival.
            if weight.ndim == 2 and "A_log" not in name:
                weight.normal_(std=0.5)
    model.eval()
    weights = {
        name.replace("embeddings", "embedding"): value for name, value in model.state_dict().items()
    }
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 24, "ssm_cfg": layer, "rms_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(config))

    said = run(warm, GENERATE, tmp_path, "--model-name", str(tmp_path))
    prompt, sequences, scores = json.loads(said)
    assert scores == 12
    expected = torch.tensor(prompt)
    with torch.no_grad():
        for _ in range(12):
            logits = model(expected, use_cache=False).logits[:, -1]
            best, second = logits.topk(2).values.T
            assert (best - second > 1e-3).all(), "another seed is needed: two tokens are as likely"
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert sequences == expected.tolist()
