"""Files and what is in them before anyone knows a model: paths, JSON, atomic writes, messages."""

from anymamba.checkpoint.io.atomic_file import cannot_write, flush_to_disk, write_atomically
from anymamba.checkpoint.io.json_object import MAX_JSON_BYTES, parse_json_object, read_json_object
from anymamba.checkpoint.io.messages import escaped, listed, not_text, shown
from anymamba.checkpoint.io.paths import user_path

__all__ = [
    "MAX_JSON_BYTES",
    "cannot_write",
    "escaped",
    "flush_to_disk",
    "listed",
    "not_text",
    "parse_json_object",
    "read_json_object",
    "shown",
    "user_path",
    "write_atomically",
]
