"""Train on one long sequence that several processes share, each holding a chunk of it.

    torchrun --standalone --nproc-per-node 2 examples/long_sequence.py

Every process keeps the activations of its own chunk only: that is what does not fit into one
machine when a sequence is very long. The weights are whole on each (see docs/distributed.md for
both at once). The text is one that asks for a memory: the same block over and over.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from anymamba import MambaConfig, MambaForCausalLM
from anymamba.training.distributed import sequence_loss, sequence_parallel, sum_gradients


def main() -> None:
    """Join the other processes, train, and say how it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens of the whole sequence")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}" if on_gpu else "cpu"

    torch.manual_seed(0)  # the same weights and the same text on all processes
    config = MambaConfig(vocab_size=32, hidden_size=64, num_hidden_layers=2)
    model = MambaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    block = torch.randint(32, (1, 64), device=device)
    input_ids = block.repeat(1, arguments.length // 64 + 1)[:, : arguments.length]

    for step in range(arguments.steps):
        optimizer.zero_grad()
        with sequence_parallel(model):
            loss = sequence_loss(model, input_ids)
            loss.backward()
        sum_gradients(model)
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
