"""Training with more than one process: sharded weights, their checkpoints, shared sequences."""

from anymamba.renamed import old_names
from anymamba.training.distributed.checkpoints import export_sharded, load_sharded, save_sharded
from anymamba.training.distributed.sequence import (
    chunk_of,
    sequence_loss,
    sequence_parallel,
    sum_gradients,
)
from anymamba.training.distributed.sharding import shard

__all__ = [
    "chunk_of",
    "export_sharded",
    "load_sharded",
    "save_sharded",
    "sequence_loss",
    "sequence_parallel",
    "shard",
    "sum_gradients",
]

__getattr__ = old_names(__name__)
