"""Training with more than one process: sharded weights, their checkpoints, shared sequences."""

from anymamba.training.distributed.checkpoints import export_sharded, load_sharded, save_sharded
from anymamba.training.distributed.sequence import (
    sequence_loss,
    sequence_parallel,
    stretch_of,
    sum_gradients,
)
from anymamba.training.distributed.sharding import shard

__all__ = [
    "export_sharded",
    "load_sharded",
    "save_sharded",
    "sequence_loss",
    "sequence_parallel",
    "shard",
    "stretch_of",
    "sum_gradients",
]
