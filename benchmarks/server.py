"""Is a server as fast as its engine, and does it keep what it promises under load?

Servers run in processes of their own, as `anymamba serve` starts them; clients share the processors
with them. Speeds take turns with the bare batch engine in this process.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

import anymamba
from anymamba import Engine
from anymamba.assets import bundled_model
from anymamba.checkpoint.gguf.writer import write_gguf
from common.http_client import Answer, all_at_once, ask
from common.machine import describe
from common.options import Options, options_from, parser
from common.random_checkpoint import write_checkpoint
from common.results import finish
from common.server_process import OurServer, TheirServer
from common.shapes import MAMBA_130M
from common.tables import NAME, NOTE, Column, Row, Table, not_measured, timed
from common.timing import Case, Timing, interleave

CLIENTS = (1, 16, 64)
KINDS = ("f32", "bf16", "int8", "int4")
WEIGHTS = "int8"
PROMPT, STEPS = 16, 128
PARALLEL = ("--parallel", 64)
SPEED = Column("tokens_per_second", "tokens/s", "{:.4g}")
SHARE = Column("share_of_limit", "of the bare engine", "{:.2f}")
MS = Column("ms", "ms", "{:.4g}")
OVER_ONE = Column("over_one", "times one text", "{:.2f}")
OF_PROMPT = Column("share_of_prompt", "of a prompt's speed", "{:.2f}")
VALUE = Column("value", "", "{:.4g}")
TARGET = Column("target", "target")
PEER_ROUNDS = 2


def main() -> None:
    """Measure what was asked for; print and write."""
    arguments = parser("server", __doc__ or "")
    arguments.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parsed = arguments.parse_args()
    options = options_from(parsed)
    machine = describe(options.quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = bundled_model() if options.quick else write_checkpoint(MAMBA_130M, folder / "model")
        tables = [SECTIONS[only](model, folder, options) for only in parsed.only]
    finish("server", options, machine, tables)


def our_server(model: Path, *options: object) -> OurServer:
    """A server of a model in this script's weight type, with as many threads as all cases."""
    threads = ("--threads", torch.get_num_threads())
    return OurServer("--model", model, "--weights", WEIGHTS, "--name", "m", *threads, *options)


def our_engine(model: Path) -> Engine:
    """What the server has inside."""
    return anymamba.load(model, weights=WEIGHTS, threads=torch.get_num_threads())


def prompt(source: random.Random, length: int) -> list[int]:
    """Tokens that no cache knows."""
    return [source.randrange(32, 127) for _ in range(length)]


def request(ids: Sequence[int], tokens: int, **fields: Any) -> dict[str, Any]:
    """A streamed greedy completion of so many tokens."""
    return {
        "prompt": list(ids),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


def speeds(model: Path, folder: Path, options: Options) -> Table:
    """Tokens a second of clients at once, beside the engine's `generate_batch`."""
    steps = 8 if options.quick else STEPS
    clients = (1, 4) if options.quick else CLIENTS
    engine, source = our_engine(model), random.Random(0)
    table = Table(
        f"Clients at once, {steps} tokens each, streamed, {WEIGHTS}", (NAME, MS, SPEED, SHARE, NOTE)
    )
    with our_server(model, *PARALLEL) as server:
        cases = []
        for count in clients:
            bare = partial(bare_batch, engine, source, count, steps)
            served = partial(crowd, server.port, source, count, steps)
            cases.append(Case(f"bare engine, {count} texts", bare, own_clock=True))
            cases.append(Case(f"server, {count} clients", served, own_clock=True))
        timings = interleave(cases, options.rounds or 5)
        theirs, missing = peer(model, folder, clients, steps, options)
    timings |= theirs
    for name, timing in timings.items():
        count = int(name.split()[-2])
        bare_timing = timings[f"bare engine, {count} texts"]
        table.rows.append(timed(name, timing, count * steps, bare_timing))
    table.rows += missing
    return table


def texts(model: Path, folder: Path, options: Options) -> Table:
    """The bare engine: texts at once beside one, and beside reading, by weight type."""
    steps, length = (4, 16) if options.quick else (32, 512)
    source, cases = random.Random(0), []
    for kind in KINDS:
        engine = anymamba.load(model, weights=kind, threads=torch.get_num_threads())
        read = partial(engine.generate, prompt(source, length), max_new_tokens=1)
        cases.append(Case(f"{kind}: a prompt of {length} tokens", read))
        for count in CLIENTS:
            prompts = [[5 + row] for row in range(count)]
            write = partial(engine.generate_batch, prompts, max_new_tokens=steps, stop_ids=())
            cases.append(Case(f"{kind}: {count} texts", write))
    timings = interleave(cases, options.rounds or 5)
    table = Table(
        f"Texts at once, {steps} tokens each, bare engine", (NAME, MS, SPEED, OVER_ONE, OF_PROMPT)
    )
    for name, timing in timings.items():
        kind = name.split(":")[0]
        reading = length / timings[f"{kind}: a prompt of {length} tokens"].median
        one = steps / timings[f"{kind}: 1 texts"].median
        tokens = length if "prompt" in name else int(name.split()[1]) * steps
        row = timed(name, timing, tokens)
        if "texts" in name:
            speed = tokens / timing.median
            row |= {"over_one": speed / one, "share_of_prompt": speed / reading}
        table.rows.append(row)
    return table


def bare_batch(engine: Engine, source: random.Random, count: int, steps: int) -> float:
    """Seconds of the engine alone."""
    prompts = [prompt(source, PROMPT) for _ in range(count)]
    start = time.perf_counter()
    engine.generate_batch(prompts, max_new_tokens=steps, stop_ids=())
    return time.perf_counter() - start


def crowd(port: int, source: random.Random, count: int, steps: int) -> float:
    """Seconds from the first request to the last token."""
    bodies = [request(prompt(source, PROMPT), steps) for _ in range(count)]
    start = time.perf_counter()
    answers = all_at_once(port, bodies)
    took = time.perf_counter() - start
    assert all(len(answer.seconds) == steps + 1 for answer in answers)  # and the usage
    return took


def peer(
    model: Path, folder: Path, clients: Sequence[int], steps: int, options: Options
) -> tuple[dict[str, Timing], list[Row]]:
    """llama-cpp-python's server with the same weights in 8 bits, and as many clients."""
    count = clients[1]
    name = f"llama-cpp-python's server q8_0, {count} clients"
    absent = [part for part in ("llama_cpp", "sse_starlette", "gguf") if find_spec(part) is None]
    if reason := (
        "--no-peers"
        if not options.peers
        else f"{' and '.join(absent)} not installed: pip install 'llama-cpp-python[server]' gguf"
        if absent
        else "it cannot read the bundled model's tokenizer"
        if options.quick
        else ""
    ):
        return {}, [not_measured(name, f"not measured: {reason}")]
    wide = anymamba.load(model, weights="f32").weights
    file = folder / "model.gguf"
    text = (model / "tokenizer.json").read_text(encoding="utf-8")
    write_gguf(file, wide.config, cast(Any, wide.tensors), "q8_0", text)
    source = random.Random(1)

    def run(asking: int = count) -> float:
        texts = ["".join(map(chr, prompt(source, PROMPT))) for _ in range(asking)]
        bodies = [{"prompt": text, "max_tokens": steps, "temperature": 0} for text in texts]
        start = time.perf_counter()
        answers = all_at_once(server.port, bodies)
        took = time.perf_counter() - start
        written: int = sum(answer.body["usage"]["completion_tokens"] for answer in answers)
        return took * asking * steps / written  # where a text has ended early

    with TheirServer(file, free_port(), torch.get_num_threads()) as server:
        case = Case(name, run, warm_up=partial(run, 1), own_clock=True)
        return interleave([case], min(PEER_ROUNDS, options.rounds or PEER_ROUNDS)), []


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def first_tokens(model: Path, folder: Path, options: Options) -> Table:
    """Short prompts on an idle server, and while a long one is read."""
    length, count, rounds = (1_000, 4, 1) if options.quick else (20_000, 25, options.rounds or 4)
    source = random.Random(2)
    seconds: dict[str, list[float]] = {"idle": [], "reading": []}

    async def short(port: int) -> float:
        body = request(prompt(source, 64), 1, user="short")
        return (await ask(port, body)).seconds[0]

    async def several(port: int, how: str) -> None:
        for _ in range(count):
            seconds[how].append(await short(port))

    async def read_long(port: int) -> None:
        while True:
            await ask(port, request(prompt(source, length), 1, user="long"))

    async def run(port: int) -> None:
        await short(port)
        for _ in range(rounds):
            await several(port, "idle")
            reading = asyncio.ensure_future(read_long(port))
            await asyncio.sleep(0.3)
            await several(port, "reading")
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await asyncio.sleep(0.3)

    with our_server(model) as server:
        asyncio.run(run(server.port))
    table = Table(
        f"First token of 64, on an idle server and while {length:,} are read",
        (NAME, Column("ms", "median ms", "{:.4g}"), VALUE, TARGET),
    )
    last = {how: percentile(found) for how, found in seconds.items()}
    for how, found in seconds.items():
        table.rows.append({"name": f"{how}, 99th percentile, ms", "value": 1e3 * last[how]})
        table.rows.append({"name": f"{how}, median", "ms": 1e3 * median(found)})
    ratio = last["reading"] / last["idle"]
    table.rows.append({"name": "99th percentiles' ratio", "value": ratio, "target": "5, better 2"})
    return table


def percentile(values: Sequence[float], share: float = 0.99) -> float:
    """The value that so many are no larger than."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def turns(model: Path, folder: Path, options: Options) -> Table:
    """A conversation's second turn, and its third after a restart."""
    length = 500 if options.quick else 10_000
    source, cache = random.Random(3), folder / "turns"
    first = prompt(source, length)
    second = first + prompt(source, 17)  # an answer of a token, and new words
    third = second + prompt(source, 17)

    async def turn(port: int, ids: list[int]) -> float:
        return (await ask(port, request(ids, 1))).seconds[0]

    def both(server: OurServer) -> list[float]:
        return [asyncio.run(turn(server.port, ids)) for ids in (first, second)]

    rounds = []
    for _ in range(1 if options.quick else options.rounds or 3):
        with our_server(model) as server:
            asyncio.run(turn(server.port, prompt(source, 64)))
            rounds.append(both(server))
    with our_server(model, "--cache-dir", cache) as server:
        both(server)
    with our_server(model, "--cache-dir", cache) as server:
        body = request(third, 1, stream=False, stream_options=None)
        answer = asyncio.run(ask(server.port, body))
    table = Table(f"A conversation of {length:,} tokens, then 17 new ones", (NAME, VALUE, TARGET))
    times = [median(round_[turn] for round_ in rounds) for turn in (0, 1)]
    table.rows = [
        {"name": "first turn to its first token, ms", "value": 1e3 * times[0]},
        {"name": "second turn to its first token, ms", "value": 1e3 * times[1]},
        {
            "name": "first over second",
            "value": median(one / two for one, two in rounds),
            "target": "50, better 200",
        },
        {
            "name": "tokens read again after a restart",
            "value": len(second) - answer.cached,
            "target": "0",
        },
    ]
    return table


def sessions(model: Path, folder: Path, options: Options) -> Table:
    """Many conversations on disk, with the bundled model: some go on, and memory stays."""
    count, going_on = (200, 20) if options.quick else (10_000, 100)
    budget, source = 32 << 20, random.Random(4)
    texts = [prompt(source, 16) for _ in range(count)]
    cache = ("--cache-memory", budget, "--cache-dir", folder / "sessions", "--queue", 64)

    async def read(port: int, chosen: Sequence[list[int]]) -> list[Answer]:
        answers: list[Answer] = []
        for at in range(0, len(chosen), 16):
            bodies = [
                request(ids, 1, stream=False, stream_options=None) for ids in chosen[at:][:16]
            ]
            answers += await asyncio.gather(*(ask(port, body) for body in bodies))
        return answers

    with our_server(bundled_model(), *cache) as server:
        asyncio.run(read(server.port, texts[: count // 4]))
        quarter = server.memory()
        asyncio.run(read(server.port, texts[count // 4 :]))
        before = server.memory()
        again = [ids + prompt(source, 4) for ids in source.sample(texts, going_on)]
        answers = asyncio.run(read(server.port, again))
        after = server.memory()
    table = Table(
        f"{count:,} sessions on disk, {budget >> 20} MB of memory for them", (NAME, VALUE, TARGET)
    )
    table.rows = [
        {"name": "memory with a quarter of them, MB", "value": quarter / 1e6},
        {"name": "memory with all of them, MB", "value": before / 1e6},
        {"name": f"growth while {going_on} go on, MB", "value": (after - before) / 1e6},
        {
            "name": f"of {going_on}, read again",
            "value": sum(answer.cached != len(texts[0]) for answer in answers),
            "target": "0",
        },
    ]
    return table


MALFORMED: tuple[object, ...] = (
    b"{",
    {"prompt": 5},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "wings": 2},
    {"prompt": [300]},
    {"prompt": "a", "model": "none"},
)


def requests(model: Path, folder: Path, options: Options) -> Table:
    """A seventh are hung up on, a seventh malformed: the others' answers are the engine's."""
    count = 70 if options.quick else 1_000
    source, engine = random.Random(5), our_engine(bundled_model())
    lengths = [source.randrange(4, 40) for _ in range(count)]
    prompts = [prompt(source, source.randrange(1, 200)) for _ in range(count)]
    found: list[Answer | None] = [None] * count

    async def one(port: int, index: int, turn: asyncio.Semaphore) -> None:
        async with turn:
            if index % 7 == 0:
                await ask(port, request(prompts[index], 10_000), hang_up_after=3)
            elif index % 7 == 1:
                found[index] = await ask(port, MALFORMED[index // 7 % len(MALFORMED)])
            elif index % 2:
                found[index] = await ask(port, request(prompts[index], lengths[index]))
            else:
                fields = {"stream": False, "stream_options": None}
                found[index] = await ask(port, request(prompts[index], lengths[index], **fields))

    async def run(port: int) -> None:
        turn = asyncio.Semaphore(64)
        await asyncio.gather(*(one(port, index, turn) for index in range(count)))

    with our_server(bundled_model(), "--parallel", 16) as server:
        start = time.perf_counter()
        asyncio.run(run(server.port))
        took, leaked = time.perf_counter() - start, left_over(server.port)
    lost = wrong = 0
    for index, answer in enumerate(found):
        if index % 7 == 1:
            wrong += answer is None or answer.status not in (400, 404)
        elif index % 7:
            lost += answer is None
            wrong += answer is not None and text_of(answer) != written(
                engine, prompts[index], lengths[index]
            )
    table = Table(f"{count:,} requests, 64 at a time, {took:.1f} s", (NAME, VALUE, TARGET))
    for name, value in (("lost", lost), ("wrong", wrong), ("leaked", leaked)):
        table.rows.append({"name": name, "value": value, "target": "0"})
    return table


def left_over(port: int) -> int:
    """What runs or waits a moment after all clients are gone."""
    import json
    import urllib.request

    time.sleep(0.5)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        health = json.load(answer)
    left: int = health["running"] + health["waiting"]
    return left


def text_of(answer: Answer) -> str:
    """What was written, streamed or not."""
    return answer.body["choices"][0]["text"] if "choices" in answer.body else answer.text


def written(engine: Engine, ids: list[int], tokens: int) -> str:
    """What it should be."""
    return engine.generate(ids, max_new_tokens=tokens).text


def starts(model: Path, folder: Path, options: Options) -> Table:
    """From the command to `/health`, with the bundled model and with this one."""

    def start(place: Path, *more: object) -> None:
        with OurServer("--model", place, *more) as server:
            os.kill(server.process.pid, signal.SIGKILL)

    cases = [Case("bundled model", partial(start, bundled_model()))]
    if not options.quick:
        cases.append(Case("mamba-130m, float32 as stored", partial(start, model)))
    rounds = options.rounds or 9
    rows = [timed(name, timing) for name, timing in interleave(cases, rounds).items()]
    rows.append({"name": "target", "ms": 1000.0, "note": "better 400"})
    return Table("`anymamba serve` to `/health`", rows=rows)


SECTIONS: dict[str, Callable[[Path, Path, Options], Table]] = {
    "texts": texts,
    "speeds": speeds,
    "first_tokens": first_tokens,
    "turns": turns,
    "sessions": sessions,
    "requests": requests,
    "starts": starts,
}


if __name__ == "__main__":
    main()
