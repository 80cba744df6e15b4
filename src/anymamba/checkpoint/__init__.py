"""What a model is on disk: layouts, names, reading, writing, and the hub.

A model's name becomes a folder (`resolve`), the folder is opened (`open_checkpoint`), which reads
its config in whichever layout it has (`read_config`), finds the weight files and reads their
headers (`read_header`). From there on every tensor has Transformers' name. Which tensors a model
has stands in `architecture`; `expected_shapes` asks it, and `check_tensors` names all that differs.
The weights are then loaded by torch (`load_torch_state_dict`), or mapped by `source.open_tensors`.
`checkpoint_digest` and `state_dict_digest` tell which weights they are, and `read_state_file`
whether a saved state belongs to them.

Files come from strangers: nothing in them is run, and every number is checked before it is used.
Importing this package imports neither torch nor numpy; only what touches tensors does.
"""

from anymamba.checkpoint.architecture import to_transformers_name
from anymamba.checkpoint.checkpoint import Checkpoint, canonical_names, open_checkpoint
from anymamba.checkpoint.config import Layout, read_config
from anymamba.checkpoint.files import find_weight_files
from anymamba.checkpoint.fingerprint import bytes_digest, checkpoint_digest, state_dict_digest
from anymamba.checkpoint.hub import resolve
from anymamba.checkpoint.io import write_atomically
from anymamba.checkpoint.quantized_folder import FORMAT, quantized_bits, quantized_shapes
from anymamba.checkpoint.safetensors import (
    SafetensorsHeader,
    TensorBytes,
    TensorRecord,
    read_header,
    write_safetensors,
)
from anymamba.checkpoint.shapes import ModelShape, check_tensors, expected_shapes, model_shape
from anymamba.checkpoint.state_file import (
    StateFile,
    check_finite_blocks,
    check_identity,
    read_state_file,
    state_identity,
    state_metadata,
)
from anymamba.checkpoint.torch_weights import load_stored_tensors, load_torch_state_dict

__all__ = [
    "FORMAT",
    "Checkpoint",
    "Layout",
    "ModelShape",
    "SafetensorsHeader",
    "StateFile",
    "TensorBytes",
    "TensorRecord",
    "bytes_digest",
    "canonical_names",
    "check_finite_blocks",
    "check_identity",
    "check_tensors",
    "checkpoint_digest",
    "expected_shapes",
    "find_weight_files",
    "load_stored_tensors",
    "load_torch_state_dict",
    "model_shape",
    "open_checkpoint",
    "quantized_bits",
    "quantized_shapes",
    "read_config",
    "read_header",
    "read_state_file",
    "resolve",
    "state_dict_digest",
    "state_identity",
    "state_metadata",
    "to_transformers_name",
    "write_atomically",
    "write_safetensors",
]
