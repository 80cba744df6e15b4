"""How many times faster are Transformers' own models with the drop-in for `mamba_ssm`?

Without it they run on Transformers' PyTorch code. With it, a decode step is one native call for
each mixer; norms, attention, experts and the head stay PyTorch's. A model decides when it is
imported, so that the two sides are two processes, which take turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import anymamba.dropin
from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.tables import (
    MILLISECONDS,
    NAME,
    NOTE,
    SPEED,
    SPREAD,
    Column,
    Row,
    Table,
    not_measured,
    timed,
)
from common.timing import Case, Timing, interleave

MODELS = (
    *("Mamba", "FalconMamba", "Jamba"),
    *("Mamba2", "Bamba", "Zamba2", "NemotronH", "GraniteMoeHybrid", "FalconH1"),
)
PREFILL, DECODE, TRAIN = "prefill", "decode", "train"
WITHOUT, WITH = "without", "with the drop-in"
TIMES = Column("times_without", "x without", "{:.1f}")


def main() -> int:
    """Measure in two other processes; or be one of them."""
    arguments_of = parser("dropin", __doc__ or "")
    arguments_of.add_argument("--serve", choices=(WITHOUT, WITH), help=argparse.SUPPRESS)
    arguments = arguments_of.parse_args()
    options = options_from(arguments)
    if arguments.serve:
        serve(arguments.serve, options.quick)
        return 0
    machine = describe(options.quick)
    finish("dropin", options, machine, measured(options))
    return 0


def measured(options: Options) -> list[Table]:
    """A table for each kind of work, with all models."""
    sizes = sizes_of(options.quick)
    titles = {
        PREFILL: f"Prefill of {sizes[PREFILL]} tokens, last logits only",
        DECODE: f"Decoding {sizes[DECODE]} tokens with `generate`",
        TRAIN: f"Training step, 1 x {sizes[TRAIN]} tokens (forward and backward)",
    }
    shape = f"Transformers' models, {depth_and_width(options.quick)}, float32"
    columns = (NAME, MILLISECONDS, SPREAD, SPEED, TIMES, NOTE)
    tables = {what: Table(f"{title} ({shape})", columns) for what, title in titles.items()}
    sides = [WITHOUT, WITH] if options.peers else [WITH]
    workers = {side: Worker(side, options) for side in sides}
    for model in MODELS:
        cases = [
            # Without the drop-in a training step takes seconds, so two turns must do.
            Case(
                f"{what} {side}",
                partial(worker.seconds, model, what),
                rounds=2 if (what, side) == (TRAIN, WITHOUT) else None,
                own_clock=True,
            )
            for what in tables
            for side, worker in workers.items()
        ]
        timings = interleave(cases, options.rounds or 5)
        for what, table in tables.items():
            table.rows += rows(model, what, timings, sizes[what])
    for worker in workers.values():
        worker.close()
    return list(tables.values())


def rows(model: str, what: str, timings: dict[str, Timing], tokens: int) -> list[Row]:
    """A model without the drop-in and with it."""
    without = timings.get(f"{what} {WITHOUT}")
    ours = timings[f"{what} {WITH}"]
    row = timed(f"{model}, {WITH}", ours, tokens)
    if without is None:
        return [not_measured(f"{model}, {WITHOUT}", "not measured: --no-peers"), row]
    row["times_without"] = ours.speed_beside(without)
    return [timed(f"{model}, {WITHOUT}", without, tokens), row]


class Worker:
    """A process with all models, on one of the two sides. It works when it is asked.

    Args:
        side: WITH or WITHOUT.
        options: of this process, for the other one.
    """

    def __init__(self, side: str, options: Options) -> None:
        command = [sys.executable, __file__, "--serve", side]
        command += ["--threads", str(torch.get_num_threads())]
        command += ["--quick"] if options.quick else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def seconds(self, model: str, what: str) -> float:
        """How long one run takes, by the clock of the process that runs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(model, what, file=self.process.stdin)
        answer = self.process.stdout.readline()
        if not answer:  # its traceback is on the screen
            raise SystemExit(f"measuring {what} of {model} failed")
        return float(answer)

    def close(self) -> None:
        """Let the process end."""
        self.process.communicate()


def serve(side: str, quick: bool) -> None:
    """Answer each line of standard input, a model and a kind of work, with seconds."""
    if side == WITH:
        anymamba.dropin.install()
    work: dict[str, dict[str, Callable[[], object]]] = {}
    for line in sys.stdin:
        name, what = line.split()
        if name not in work:
            work[name] = work_of(name, quick)
        start = time.perf_counter()
        work[name][what]()
        print(time.perf_counter() - start, flush=True)


def work_of(name: str, quick: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by its kind, for one of Transformers' models with random weights."""
    import transformers  # here, because the drop-in must come first

    # It tells at every start which kernels are missing.
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**config_of(name, quick))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    sizes = sizes_of(quick)
    prompt, trained = (
        torch.randint(2, config.vocab_size, (1, sizes[what])) for what in (PREFILL, TRAIN)
    )

    @torch.no_grad()
    def prefill() -> None:
        model.eval()(prompt, logits_to_keep=1, use_cache=False)

    def decode() -> None:
        model.eval().generate(
            prompt[:, :1],
            attention_mask=torch.ones_like(prompt[:, :1]),
            max_new_tokens=sizes[DECODE],
            do_sample=False,
        )

    def train() -> None:
        model.zero_grad()
        model.train()(trained, labels=trained, use_cache=False).loss.backward()

    return {PREFILL: prefill, DECODE: decode, TRAIN: train}


def sizes_of(quick: bool) -> dict[str, int]:
    """Tokens a run."""
    return {PREFILL: 16, DECODE: 2, TRAIN: 8} if quick else {PREFILL: 512, DECODE: 32, TRAIN: 128}


def config_of(name: str, quick: bool) -> dict[str, Any]:
    """The sizes of a model, and the shapes of its kind as published ones have them."""
    layers, width = (2, 32) if quick else (8, 512)
    common = {"vocab_size": 64 if quick else 8192, "hidden_size": width}
    common |= {"num_hidden_layers": layers, "pad_token_id": 0, "eos_token_id": None}
    head = 16 if quick else 64
    attention = {"num_attention_heads": width // head, "num_key_value_heads": width // head}
    attention |= {"intermediate_size": 2 * width}
    heads = {"mamba_n_heads": 2 * width // head, "mamba_d_head": head, "mamba_d_state": 128}
    # One layer is attention.
    kinds = ["linear_attention"] * layers
    kinds[layers // 2] = "full_attention"
    own: dict[str, Any] = {
        "Mamba": {"state_size": 16},
        "FalconMamba": {"state_size": 16},
        "Mamba2": {
            "state_size": 128,
            "head_dim": head,
            "num_heads": 2 * width // head,
            "n_groups": 1,
        },
        # Every other layer has experts.
        "Jamba": attention
        | {
            "num_experts": 4,
            "attn_layer_period": layers,
            "attn_layer_offset": layers // 2,
            "mamba_dt_rank": width // 16,
        },
        "Bamba": attention | heads | {"attn_layer_indices": [layers // 2]},
        "Zamba2": attention
        | {
            "layers_block_type": ["hybrid" if k == "full_attention" else k for k in kinds],
            "n_mamba_heads": 2 * width // head,
            "mamba_d_state": 64,
            "adapter_rank": width // 8,
        },
        # Every other layer is an MLP, unless it has attention.
        "NemotronH": attention
        | {
            "layers_block_type": [
                "mlp" if i % 2 and kind == "linear_attention" else kind
                for i, kind in enumerate(kinds)
            ],
            "head_dim": head,
            "mamba_num_heads": 2 * width // head,
            "mamba_head_dim": head,
            "n_groups": 2,
        },
        "GraniteMoeHybrid": attention
        | heads
        | {"layer_types": kinds, "num_local_experts": 0, "shared_intermediate_size": 2 * width},
        # Attention and Mamba-2 side by side in every layer.
        "FalconH1": attention | heads | {"mamba_d_ssm": 2 * width},
    }
    return common | own[name]


def depth_and_width(quick: bool) -> str:
    """The sizes that all models have in common."""
    config = config_of(MODELS[0], quick)
    return f"{config['num_hidden_layers']} layers, width {config['hidden_size']}"


if __name__ == "__main__":
    sys.exit(main())
