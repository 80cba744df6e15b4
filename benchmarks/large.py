"""Does a Falcon-Mamba of seven billion weights fit and decode with 4 bits on a small machine?

A checkpoint of falcon-mamba-7b's sizes with random bfloat16 weights is written a tensor at a time,
quantized as `anymamba quantize` does, loaded in a process of its own, and decoded. It needs some
20 GB of disk; neither the quantization nor the model needs as much memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from anymamba.checkpoint import expected_shapes
from anymamba.checkpoint.safetensors import SafetensorsStream, TensorPlan
from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.tables import NAME, NOTE, Column, Row, Table

CONFIG = {
    "model_type": "falcon_mamba",
    "vocab_size": 65024,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "state_size": 16,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QUICK = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
STEPS = 32

# Loads a folder, reads a prompt, writes, and says how long each took and how much memory it held.
DECODE = """
import json, resource, sys, time
import anymamba
start = time.perf_counter()
engine = anymamba.load(sys.argv[1])
state = engine.prefill(engine.state(), [5])
loaded = time.perf_counter()
engine.prefill(engine.state(), list(range(6, 38)))
read = time.perf_counter()
engine.generate([7], int(sys.argv[2]), do_sample=False, stop_ids=())
wrote = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"load": loaded - start, "read": read - loaded, "write": wrote - read,
                  "peak": peak, "weights": engine.weight_bytes}))
"""


def main() -> None:
    """Write, quantize, load and decode; then print and write."""
    options = options_from(parser("large", __doc__ or "").parse_args())
    config = CONFIG | (QUICK if options.quick else {})
    machine = describe(options.quick)
    with tempfile.TemporaryDirectory() as name:
        folder, quantized = Path(name) / "bf16", Path(name) / "int4"
        write_random(folder, config)
        start = time.perf_counter()
        command = [sys.executable, "-m", "anymamba", "quantize", folder, quantized]
        subprocess.run([*command, "--weights", "int4"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        shutil.rmtree(folder)
        arguments = [sys.executable, "-c", DECODE, quantized, str(STEPS)]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
    figures = {
        "quantizing to 4 bits, s": seconds,
        "weights in memory, GB": found["weights"] / 1e9,
        "loading and the first token, s": found["load"],
        "reading 32 tokens, tokens/s": 32 / found["read"],
        "decoding, tokens/s": STEPS / found["write"],
        "peak memory of the process, GB": found["peak"] / 1e9,
    }
    rows: list[Row] = [{"name": name, "value": value} for name, value in figures.items()]
    weights = sum(int(np.prod(shape)) for shape in expected_shapes(config).values())
    title = f"falcon-mamba-7b's sizes, random weights ({weights / 1e9:.2f} billion), 4 bits"
    columns = (NAME, Column("value", "measured", "{:.4g}"), NOTE)
    finish("large", options, machine, [Table(title, columns=columns, rows=rows)])


def write_random(folder: Path, config: dict[str, object]) -> None:
    """A checkpoint in Transformers' layout; A_log and D as they start, matrices random."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(config)
    plans = {name: TensorPlan("BF16", shape) for name, shape in shapes.items()}
    random = np.random.default_rng(0)
    # bfloat16 numbers of 2^-6 to 2^-5 and either sign, without a generator's time for each.
    block = 0x3C80 + random.integers(0, 0x80, 1 << 20) + 0x8000 * random.integers(0, 2, 1 << 20)
    block = block.astype(np.uint16)
    with SafetensorsStream(folder / "model.safetensors", plans, {"format": "pt"}) as stream:
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            if name.endswith(("A_log", "D", "norm.weight", "norm_f.weight")):
                values = np.full(count, 0x3F80, np.uint16)  # ones
            else:
                values = np.resize(block, count)
            stream.put(name, values.data)


if __name__ == "__main__":
    main()
