"""Opens broken files of every kind: python -m tests.runtime.hostile COUNT FOLDER

Prints each case before it is tried, so that the last line names the one that ended the process.
A case must work or raise one of `anymamba.errors`, in little more memory than the files take.
"""

import json
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anymamba.errors import AnyMambaError
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.engine import Engine
from anymamba.runtime.loading import load
from tests.support import files, gguf_files

# The process takes a third of this before the first case. A case that asks for more than the rest
# fails, and so does one that would fill a machine.
MEMORY = 2 << 30
WILD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 31, 33, 1.5, -0.0, 1e300, float("nan"), float("inf")),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, 10**400),
    *("", "x", "mamba", "auto", "\0", "../../etc/passwd", "é\ud800", "a" * 5000, "silu"),
    *([], {}, [1], [[]], [0, 0], {"a": 1}, [2**63] * 3, [None] * 100),
]

Change = Callable[[bytes, Random], bytes]


# Ways to break a file


def other_bytes(data: bytes, rng: Random) -> bytes:
    broken = bytearray(data)
    # Most of a file is numbers that may be anything; what can break lies in front.
    reach = len(broken) if rng.random() < 0.3 else min(len(broken), 3000)
    for _ in range(rng.randint(1, 6)):
        if reach:
            broken[rng.randrange(reach)] = rng.choice([0, 1, 9, 127, 128, 255, rng.randrange(256)])
    return bytes(broken)


def cut_short(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def longer(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice([1, 8, 1000])) + data[place:]


def a_piece_again(data: bytes, rng: Random) -> bytes:
    begin = rng.randrange(len(data) + 1)
    piece = data[begin : begin + rng.choice([1, 8, 64, 4096])]
    place = rng.randrange(min(len(data), 3000) + 1)
    return data[:place] + piece + data[place + rng.choice([0, len(piece)]) :]


def a_huge_number(data: bytes, rng: Random) -> bytes:
    """Where a count, a length or an offset may stand."""
    place = rng.randrange(min(len(data), 3000) + 1)
    number = rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])
    width = rng.choice([4, 8])
    return (
        data[:place] + (number % 2 ** (8 * width)).to_bytes(width, "little") + data[place + width :]
    )


def numbers_that_are_none(data: bytes, rng: Random) -> bytes:
    """Among the weights: NaN, infinity and the largest, in any type."""
    broken = bytearray(data)
    for _ in range(rng.randint(1, 20)):
        place = rng.randrange(len(broken) + 1) & ~3
        broken[place : place + 4] = rng.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\x7c\0\x7c", b"\xff" * 4]
        )
    return bytes(broken[: len(data)])


def nothing_there(data: bytes, rng: Random) -> bytes:
    return rng.choice([b"", b"\0" * len(data), b"{}", b"[]", b"null", b"[" * 100_000, b"\xff\xfe"])


def other_fields(data: bytes, rng: Random) -> bytes:
    """JSON with some of its values, names or brackets changed."""
    fields = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        change_somewhere(fields, rng)
    return json.dumps(fields).encode("utf-8", "surrogatepass")


def change_somewhere(value: Any, rng: Random) -> None:
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys[:40] if rng.random() < 0.8 else keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        what = rng.random()
        if what < 0.15:
            del value[key]
        elif what < 0.25 and isinstance(value, dict):
            value[rng.choice(["", "x", "__metadata__", "a" * 300, *map(str, keys)])] = value.pop(
                key
            )
        elif what < 0.35:
            value[key] = value[rng.choice(keys)] if isinstance(value, dict) else [value[key]]
        else:
            value[key] = deepcopy(rng.choice(WILD))
        return


def other_header(data: bytes, rng: Random) -> bytes:
    """A safetensors file with its header's fields changed, and its length right."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = other_fields(data[8:end], rng)
    return len(text).to_bytes(8, "little") + text + data[end:]


ON_ALL: list[Change] = [
    other_bytes,
    other_bytes,
    cut_short,
    longer,
    a_piece_again,
    a_huge_number,
    numbers_that_are_none,
    nothing_there,
]


def changes_for(path: Path) -> list[Change]:
    if path.suffix == ".json":
        return [*ON_ALL, *[other_fields] * 12]
    if path.suffix in (".safetensors", ".state"):
        return [*ON_ALL, *[other_header] * 8]
    return ON_ALL


# What is broken, and who reads it


def write_originals(place: Path) -> None:
    files.write_folder(place / "plain")
    convert(place / "plain", place / "original", "original", "bf16")
    convert(place / "plain", place / "minimal", "minimal", "f16")
    shutil.copytree(place / "plain", place / "quantized")
    files.write_quantized(place / "quantized", files.CONFIG, files.tensors(), 4, 32)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        gguf_files.write(place / f"{kind}.gguf", kind)
    for kind in ("Q4_1", "Q4_K", "Q5_K"):
        gguf_files.write_wide(place / f"{kind}.gguf", kind, head="Q6_K")
    (place / "parts").mkdir()
    gguf_files.write_wide(place / "parts" / "model.gguf", "Q4_0", head="Q6_K", parts=5)
    convert(place / "plain", place / "tokens.gguf", "gguf", "f16")
    engine = load(place / "plain")
    for dtype in ("float32", "bfloat16"):
        engine.prefill(engine.state(), "It's a long way").save(place / f"{dtype}.state", dtype)


def use(engine: Engine) -> None:
    """All that a broken file could still disturb once it was taken."""
    engine.logits([0, 1, 5])
    engine.generate([1, 2], max_new_tokens=3, temperature=0.8, seed=1)
    engine.generate("It's", max_new_tokens=2)
    engine.detokenize([0, 3, 299])


def open_model(path: Path, rng: Random, folder: Path, sound: Engine) -> None:
    use(load(path, rng.choice(["auto", "auto", "f32", "bf16", "int8", "int4"])))


def convert_model(path: Path, rng: Random, folder: Path, sound: Engine) -> None:
    layout = rng.choice(["transformers", "original", "minimal", "gguf"])
    gguf_weights = layout == "gguf" and rng.random() < 0.5
    kinds = ["q8_0", "q4_0", "f16"] if gguf_weights else [None, "f32", "f16", "bf16"]
    destination = folder / ("new.gguf" if layout == "gguf" else "new")
    convert(path, destination, layout, rng.choice(kinds))
    load(destination, "auto")  # what was written is sound


def open_state(path: Path, rng: Random, folder: Path, sound: Engine) -> None:
    state = sound.load_state(path)
    sound.generate([1], max_new_tokens=2, state=state)


def broken_copy(original: Path, folder: Path, rng: Random) -> tuple[Path, str]:
    copy = folder / original.name
    if original.is_dir():
        shutil.copytree(original, copy)
        file = rng.choice(sorted(copy.iterdir()))
    else:
        shutil.copyfile(original, copy)
        file = copy
    data = file.read_bytes()
    change = rng.choice(changes_for(file))
    file.write_bytes(change(data, rng))
    return copy, f"{original.name}/{file.name} {change.__name__}"


def main(examples: int, place: Path) -> None:
    originals = place / "originals"
    originals.mkdir()
    write_originals(originals)
    sound = load(originals / "plain", threads=1)
    # The library's threads would take address space that is not theirs to use.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts: Counter[str] = Counter()
    names = sorted(entry.name for entry in originals.iterdir())

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(name=st.sampled_from(names), seed=st.integers(0, 2**32))
    def one(name: str, seed: int) -> None:
        rng = Random(seed)
        folder = place / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path, what = broken_copy(originals / name, folder, rng)
        reads = open_state if path.suffix == ".state" else rng.choice([open_model, convert_model])
        print(f"{reads.__name__} {what} (seed {seed})", flush=True)
        try:
            reads(path, rng, folder, sound)
        except AnyMambaError as error:
            files.one_line(error)
            counts[type(error).__name__] += 1
        else:
            counts["worked"] += 1

    one()
    print(dict(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
