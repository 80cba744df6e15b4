"""How fast is a training step of a model as `anymamba train` makes them on a CPU?"""

from __future__ import annotations

from anymamba.cli.openmp import let_waiting_threads_sleep

let_waiting_threads_sleep()  # as `anymamba train` does, before PyTorch is there

import torch

from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.roofline import ModelProducts
from common.shapes import DEEP_5M, QUICK, WIDE_5M, Shape
from common.tables import MILLISECONDS, NAME, NOTE, SHARE, SPEED, SPREAD, Table, not_measured, timed
from common.timing import interleave
from contenders.anymamba_model import AnyMamba, AutocastAnyMamba, random_model
from contenders.registry import MINIMAL, TRANSFORMERS, Peers
from train import LIMIT, OURS, TIMES, TRAINABLE, built, limits, step_case, title, whole_steps

OURS_IN_BFLOAT16 = "AnyMamba, autocast to bfloat16"


def main() -> None:
    """Measure a deep and a wide model, then print and write."""
    options = options_from(parser("train_5m", __doc__ or "").parse_args())
    machine = describe(options.quick)
    shapes = (QUICK,) if options.quick else (DEEP_5M, WIDE_5M)
    batch_and_length = (2, 16) if options.quick else (8, 512)
    tables = [beside_limit_and_transformers(shape, batch_and_length, options) for shape in shapes]
    finish("train_5m", options, machine, tables)


def beside_limit_and_transformers(
    shape: Shape, batch_and_length: tuple[int, int], options: Options
) -> Table:
    """AnyMamba in both types that it may train in, beside the limit and the peers."""
    source = random_model(shape)
    ids_bl = torch.randint(shape.vocab_size, batch_and_length)
    rows = ids_bl.numel()
    peers = Peers(shape, source, options.peers)
    cases = [
        *limits(ModelProducts(source, rows=rows, head_rows=rows)),
        step_case(OURS, AnyMamba(source), ids_bl),
        step_case(OURS_IN_BFLOAT16, AutocastAnyMamba(source), ids_bl),
    ]
    missing = []
    for name in TRAINABLE:
        if row := peers.missing(name):
            missing.append(row)
        elif name == MINIMAL:
            missing.append(not_measured(name, "as slow as Transformers: measured by train.py"))
        else:
            cases.append(step_case(name, built(peers, name), ids_bl, turns=1))
    timings = interleave(cases, options.rounds or 5)
    whole_steps(timings)
    table = Table(
        title("Training step of 5 million weights", shape, ids_bl),
        columns=(NAME, MILLISECONDS, SPREAD, SPEED, SHARE, TIMES, NOTE),
    )
    for name, timing in timings.items():
        row = timed(name, timing, rows, timings[LIMIT])
        if TRANSFORMERS in timings:
            row["times_transformers"] = timing.speed_beside(timings[TRANSFORMERS])
        table.rows.append(row)
    table.rows += missing
    return table


if __name__ == "__main__":
    main()
