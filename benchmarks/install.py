"""How long from an empty environment to the first token, with a wheel and a warm package cache?

Each round makes an environment, has pip install the wheel with all that it needs, and lets
`anymamba generate` write a token. A first round, which is not counted, fills pip's cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common.machine import describe
from common.options import options_from, parser
from common.results import finish
from common.tables import Column, Row, Table, not_measured, timed
from common.timing import Timing

ROOT = Path(__file__).parents[1]
TARGET_SECONDS = 10
STEPS = ("make the environment", "pip install the wheel", "generate the first token")
COLUMNS = (*Table("").columns, Column("megabytes", "MB on disk", "{:.0f}"))


def main() -> None:
    """Measure, then print and write."""
    options = parser("install", __doc__ or "")
    options.add_argument("--wheel", type=Path, help="the wheel to install; default: build one")
    arguments = options.parse_args()
    common = options_from(arguments)
    machine = describe(common.quick)
    with tempfile.TemporaryDirectory() as name:
        rows = measured(Path(name), arguments, common.rounds or 3)
    title = "From an empty environment to the first token"
    finish("install", common, machine, [Table(title, COLUMNS, rows)])


def measured(folder: Path, arguments: argparse.Namespace, rounds: int) -> list[Row]:
    """A row for each step, and one for all of them."""
    if arguments.quick:
        environment = Timing({at: clock(make, folder / str(at)) for at in range(rounds)})
        reason = "not measured: a smoke run installs nothing"
        return [timed(STEPS[0], environment), *(not_measured(step, reason) for step in STEPS[1:])]
    wheel = arguments.wheel or build(folder / "wheels")
    install(wheel, folder / "warm")
    taken = [install(wheel, folder / str(at)) for at in range(rounds)]
    steps = [Timing(dict(enumerate(seconds))) for seconds in zip(*taken, strict=True)]
    rows = [timed(step, timing) for step, timing in zip(STEPS, steps, strict=True)]
    rows[1]["megabytes"] = size_of(folder / "0") / 1e6
    asked = Timing({at: sum(seconds[1:]) for at, seconds in enumerate(taken)})
    everything = Timing({at: sum(seconds) for at, seconds in enumerate(taken)})
    return [
        *rows,
        timed("install and first token", asked, note=f"asked: {TARGET_SECONDS} s"),
        timed("with making the environment", everything),
    ]


def build(folder: Path) -> Path:
    """This checkout's wheel."""
    options = ("--no-deps", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT, ANYMAMBA_REQUIRE_NATIVE="1")
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> tuple[float, float, float]:
    """What each step takes, in seconds."""
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = (commands / "python", "-m", "pip", "install", "--quiet", wheel)
    generate = (commands / "anymamba", "generate", "ROMEO:", "--max-new-tokens", "1")
    return clock(make, folder), clock(run, *pip), clock(run, *generate)


def make(folder: Path) -> None:
    """An empty environment."""
    run(sys.executable, "-m", "venv", folder)


def clock(function: Callable[..., object], *arguments: object) -> float:
    """How long a call takes, in seconds."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def run(*command: object, **environment: str) -> None:
    """A command that must end well."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stderr}")


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder; links lead outside."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


if __name__ == "__main__":
    main()
