"""How much disk the package takes with all that `pip install anymamba` brings along."""

import importlib.metadata as metadata
import re
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

MOST_MEGABYTES = 120


def closure(name: str) -> dict[str, metadata.Distribution]:
    """A distribution and all that it requires without any extra, as installed here."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [name]
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        wanted += required_by(found[name])
    return found


def required_by(distribution: metadata.Distribution) -> Iterator[str]:
    for line in distribution.requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def bytes_of(distribution: metadata.Distribution) -> int:
    """Its files without bytecode, which Python makes as it likes."""
    files = [file for file in distribution.files or [] if file.suffix != ".pyc"]
    paths = [Path(str(file.locate())) for file in files]
    return sum(path.stat().st_size for path in paths if path.is_file())


def test_the_runtime_is_small() -> None:
    sizes = {name: bytes_of(found) for name, found in closure("anymamba").items()}
    assert {"numpy", "safetensors", "tokenizers", "huggingface-hub"} <= sizes.keys()
    assert not {"torch", "transformers", "jinja2"} & sizes.keys()
    # An editable installation lists no files of its own package; a wheel of it has 8 MB or so.
    megabytes = sum(sizes.values()) / 1e6 + 10
    assert megabytes <= MOST_MEGABYTES, {n: round(s / 1e6, 1) for n, s in sizes.items()}
