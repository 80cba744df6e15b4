"""Files and what is in them before anyone knows a model: paths, JSON, atomic writes, messages."""

from anymamba.checkpoint.io.atomic_file import (
    cannot_write,
    check_writable,
    flush_to_disk,
    move_into_place,
    workplace_beside,
    write_atomically,
)
from anymamba.checkpoint.io.messages import escaped, listed, not_text, shown
from anymamba.checkpoint.io.paths import user_path
from anymamba.checkpoint.io.text import (
    MAX_JSON_BYTES,
    check_surrogates,
    parse_json_lines,
    parse_json_object,
    read_bounded,
    read_json_object,
    read_text,
)

__all__ = [
    "MAX_JSON_BYTES",
    "cannot_write",
    "check_surrogates",
    "check_writable",
    "escaped",
    "flush_to_disk",
    "listed",
    "move_into_place",
    "not_text",
    "parse_json_lines",
    "parse_json_object",
    "read_bounded",
    "read_json_object",
    "read_text",
    "shown",
    "user_path",
    "workplace_beside",
    "write_atomically",
]
