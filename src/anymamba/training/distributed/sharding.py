"""FSDP2: each process keeps a part of every weight, of its gradient and of its optimizer state."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from anymamba.errors import InputError
from anymamba.modeling.mamba import MambaForCausalLM
from anymamba.training.distributed.states import check_started


def shard(
    model: MambaForCausalLM, mesh: DeviceMesh | None = None, param_dtype: torch.dtype | None = None
) -> MambaForCausalLM:
    """Split a model over the processes, block by block, with PyTorch's `fully_shard`.

    Make the optimizer afterwards, for the weights are new tensors. A block's weights are whole
    only while the block runs, and then the fused operators read them as ever; what is off is the
    native step for the whole model at once, and `anymamba.modeling.fused.why_not_fused` says so.

    Args:
        model: what to split, in place; the same weights on all processes.
        mesh: the processes, see `torch.distributed.device_mesh`; all of them if None.
        param_dtype: what the matrices are sent and multiplied in, such as bfloat16. They stay in
            their own type between steps. Norms, convolutions, step sizes, A and D are float32
            whatever it is: the recurrence takes their errors far.

    Returns:
        The same model.

    Raises:
        InputError: there is no process group, or the model is split already.
    """
    check_started("shard")
    block_class = model.backbone.block_class
    blocks = [block for block in model.backbone.layers if type(block) is block_class]
    if len(blocks) < len(model.backbone.layers):
        raise InputError(
            f"shard: a block is no plain {block_class.__name__}; is the model split already?"
        )
    # Matrices return float32, which what stands between them goes on with.
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        output_dtype=None if param_dtype is None else torch.float32,
    )
    for block in blocks:
        if param_dtype is not None:
            mixer = block.mixer
            names = ("in_proj", "x_proj", "out_proj")
            matrices = [getattr(mixer, name) for name in names if hasattr(mixer, name)]
            fully_shard(matrices, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
