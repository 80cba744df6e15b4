"""How fast are the other models of the family, beside their limits, Transformers and llama.cpp?

Decoding reads all weights, and reads and writes the state, once a token; a prefill's limit is its
matrix products at the peak of the arithmetic, a training step's three times those.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from anymamba.cli.openmp import let_waiting_threads_sleep

let_waiting_threads_sleep()  # as `anymamba train` does, before PyTorch is there

import torch
import transformers
from torch import Tensor

import anymamba
from anymamba.errors import AnyMambaError
from anymamba.modeling.auto import CLASSES
from common.gguf_file import write_gguf
from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.roofline import ModelProducts, seconds_at_peak, seconds_to_read
from common.tables import Row, Table, not_measured, timed
from common.timing import Case, Timing, interleave
from contenders.anymamba_model import AnyMamba
from contenders.registry import PEERS
from contenders.transformers_model import Transformers

_130M = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24}
_QUICK = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {"state_size": 128, "n_groups": 1, "tie_word_embeddings": True}
# Fields of each architecture at the size of mamba-130m, and of a smoke run.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "falcon_mamba": (_130M, _QUICK),
    "mamba2": (
        {**_130M, **_HEADS, "num_heads": 24, "head_dim": 64},
        {**_QUICK, **_HEADS, "num_heads": 4, "head_dim": 16, "state_size": 16},
    ),
}
TYPES = {"bf16": "f16", "int8": "q8_0", "int4": "q4_0"}  # llama.cpp's at the same bits
PEER_ROUNDS = 2


def main() -> None:
    """Measure every architecture that was asked for, then print and write."""
    arguments = parser("family", __doc__ or "")
    arguments.add_argument("--architecture", choices=SHAPES, nargs="+", default=list(SHAPES))
    parsed = arguments.parse_args()
    options = options_from(parsed)
    machine = describe(options.quick)
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for name in parsed.architecture:
            source = random_model(name, options.quick)
            place = Path(folder) / name
            tables += [
                decoding(name, source, place, options),
                *(reading(name, source, place, length, options) for length in lengths(options)),
                training(name, source, options),
            ]
    finish("family", options, machine, tables)


def lengths(options: Options) -> tuple[int, int]:
    """The texts that are read."""
    return (16, 32) if options.quick else (512, 4096)


def random_model(name: str, quick: bool) -> Any:
    """A float32 model with the random weights that training would start from."""
    torch.manual_seed(0)
    classes = CLASSES[name]
    model = classes.causal_lm(classes.config(**SHAPES[name][quick])).eval()  # type: ignore[arg-type]
    model.generation_config.eos_token_id = None
    return model


def theirs(source: Any) -> Transformers:
    """Transformers' own class with the same weights."""
    transformers.utils.logging.set_verbosity_error()
    name = type(source).__name__
    peer = Transformers.__new__(Transformers)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    fields = {n: v for n, v in source.config.to_dict().items() if n != "intermediate_size"}
    with torch.device("meta"):
        peer.model = getattr(transformers, name)(config(**fields)).eval()
    peer.model.load_state_dict(source.state_dict(), assign=True)
    peer.model.tie_weights()
    return peer


def engines_of(source: Any, place: Path) -> dict[str, Any]:
    """The runtime's engines by weight type; none where it does not compute the architecture."""
    if not place.exists():
        source.save_pretrained(place)
    threads = torch.get_num_threads()
    try:
        return {kind: anymamba.load(place, weights=kind, threads=threads) for kind in TYPES}
    except AnyMambaError:
        return {}


def decoding(name: str, source: Any, place: Path, options: Options) -> Table:
    """One text, token by token, in the runtime and through PyTorch."""
    steps = 4 if options.quick else 32
    cases, limits = [], {}
    for kind, engine in engines_of(source, place).items():
        bytes_a_step = engine.weight_bytes + 2 * engine.state().nbytes
        limit = f"limit: weights and state once, {kind}"
        seconds = partial(lambda size: steps * seconds_to_read(size), bytes_a_step)
        cases.append(Case(limit, seconds, own_clock=True))
        run = partial(engine.generate, [5], steps, do_sample=False, stop_ids=())
        cases.append(Case(f"AnyMamba {kind}", run))
        limits[f"AnyMamba {kind}"] = limits[limit] = limits[f"llama.cpp {TYPES[kind]}"] = limit
    ids_bl = torch.randint(50, (1, steps))
    cases.append(Case("AnyMamba in PyTorch, f32", partial(AnyMamba(source).decode, ids_bl)))
    more, missing = peers(source, place, options, "decode", ids_bl, tuple(TYPES.values()))
    timings = interleave(cases + more, options.rounds or 5)
    rows = []
    for case, timing in timings.items():
        limit = timings[limits[case]].times(1 / steps) if case in limits else None
        rows.append(timed(case, timing.times(1 / steps), 1, limit))
    return Table(f"{name}: decoding, batch 1, {steps} tokens", rows=rows + missing)


def reading(name: str, source: Any, place: Path, length: int, options: Options) -> Table:
    """A prompt; the last logits."""
    ids_bl = torch.randint(50, (1, length))
    products = ModelProducts(source, rows=length, head_rows=1)
    limit = "limit: matrix products at the peak, f32"
    cases = [
        Case(limit, partial(seconds_at_peak, products.operations), own_clock=True),
        Case("AnyMamba in PyTorch, f32", partial(AnyMamba(source).prefill, ids_bl)),
    ]
    for kind, engine in engines_of(source, place).items():
        run = partial(lambda engine: engine.prefill(engine.state(), ids_bl[0].tolist()), engine)
        cases.append(Case(f"AnyMamba {kind}", run))
    short = length == lengths(options)[0]
    kinds = ("f32", *TYPES.values()) if short else None
    more, missing = peers(source, place, options, "prefill", ids_bl, kinds)
    timings = interleave(cases + more, options.rounds or (5 if short else 3))
    title = f"{name}: prefill of {length} tokens, last logits only"
    return Table(title, rows=rows_of(timings, length, limit) + missing)


def training(name: str, source: Any, options: Options) -> Table:
    """Forward and backward."""
    batch, length = (2, 16) if options.quick else (4, 512)
    ids_bl = torch.randint(50, (batch, length))
    products = ModelProducts(source, rows=ids_bl.numel(), head_rows=ids_bl.numel())
    limit = "limit: 3 x the forward products at the peak"
    seconds = partial(seconds_at_peak, 3 * products.operations)
    cases = [Case(limit, seconds, own_clock=True), step("AnyMamba", AnyMamba(source), ids_bl)]
    missing: list[Row] = []
    if options.peers and options.quick:
        cases.append(step("Transformers", theirs(source), ids_bl, rounds=1))
    else:
        why = "a step takes minutes" if options.peers else "--no-peers"
        missing.append(not_measured("Transformers", f"not measured: {why}"))
    timings = interleave(cases, options.rounds or 3)
    title = f"{name}: training step, {batch} x {length} tokens, float32"
    return Table(title, rows=rows_of(timings, ids_bl.numel(), limit) + missing)


def step(name: str, contender: Any, ids_bl: Tensor, rounds: int | None = None) -> Case:
    """One training step without the optimizer."""
    contender.model.train()
    return Case(
        name,
        partial(contender.train_step, ids_bl),
        rounds=rounds,
        prepare=contender.forget_gradients,
        warm_up=partial(contender.train_step, ids_bl[:, :8]),
    )


def rows_of(timings: dict[str, Timing], tokens: int, limit: str) -> list[Row]:
    """All rows, beside one limit."""
    return [timed(name, timing, tokens, timings[limit]) for name, timing in timings.items()]


def peers(
    source: Any,
    place: Path,
    options: Options,
    method: str,
    ids_bl: Tensor,
    kinds: tuple[str, ...] | None,
) -> tuple[list[Case], list[Row]]:
    """Transformers and llama.cpp, and rows that say why one is not measured."""
    reason = None if options.peers else "not measured: --no-peers"
    if kinds is None:
        return [], [not_measured("Transformers, llama.cpp", "measured at the short text only")]
    if reason is not None:
        return [], [not_measured("Transformers, llama.cpp", reason)]
    one = theirs(source)
    warm_up = partial(getattr(one, method), ids_bl[:, :4])
    run = partial(getattr(one, method), ids_bl)
    cases, rows = [Case("Transformers", run, PEER_ROUNDS, warm_up=warm_up)], []
    for kind in kinds:
        row = f"llama.cpp {kind}"
        try:
            if missing := PEERS["llama.cpp f32"].missing():
                raise RuntimeError(missing)
            file = place.with_suffix(f".{kind}.gguf")
            if not file.exists():
                write_gguf(source, file, kind)
            from contenders.llama_model import Llama

            cases.append(Case(row, partial(getattr(Llama(file), method), ids_bl), PEER_ROUNDS))
        except (AnyMambaError, RuntimeError) as error:
            rows.append(not_measured(row, f"not measured: {error}"))
    return cases, rows


if __name__ == "__main__":
    main()
