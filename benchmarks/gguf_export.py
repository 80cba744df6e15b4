"""Write a Mamba checkpoint as a GGUF file for llama.cpp, without a tokenizer.

example: python benchmarks/gguf_export.py state-spaces/mamba-130m-hf mamba.gguf --type q8_0
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from anymamba import MambaForCausalLM
from anymamba.errors import AnyMambaError


def main() -> int:
    """Read the command line, load, write."""
    description, _, example = (__doc__ or "").strip().partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=example)
    parser.add_argument("model", help="a folder, or an id on the hub")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--type", choices=("f32", "f16", "q8_0", "q4_0"), default="f32")
    arguments = parser.parse_args()
    if find_spec("gguf") is None:
        print("gguf is not installed: pip install 'anymamba[peers]'", file=sys.stderr)
        return 1
    from common.gguf_file import write_gguf

    try:
        model = MambaForCausalLM.from_pretrained(arguments.model, dtype="float32")
        write_gguf(model, arguments.file, arguments.type)
    except (AnyMambaError, ValueError, OSError) as error:
        print(f"{arguments.model}: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.file}: {arguments.file.stat().st_size / 1e6:.1f} MB, no tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
