"""How far are float32 logits and gradients from a float64 copy's, beside Transformers' own?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

from anymamba import MambaConfig, MambaForCausalLM
from common.machine import describe
from common.options import Options, options_from, parser
from common.results import finish
from common.tables import NAME, NOTE, Column, Row, Table, not_measured

STATE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRAWS = 20
LENGTH = 32
COLUMNS = (
    NAME,
    Column("ours", "error, median", "{:.3g}"),
    Column("theirs", "Transformers' error", "{:.3g}"),
    Column("reading", "ratio, median", "{:.2f}"),
    Column("worst", "ratio, worst", "{:.2f}"),
    NOTE,
)

Errors = dict[str, float]


def main() -> None:
    """Measure, print, write."""
    options = options_from(parser("accuracy", __doc__ or "").parse_args())
    machine = describe(quick=options.quick)
    sizes = (1, 16) if options.quick else STATE_SIZES
    finish("accuracy", options, machine, [errors_at(sizes, options)])


def errors_at(sizes: tuple[int, ...], options: Options) -> Table:
    """The root mean square of each draw's errors, ours over Transformers'."""
    draws = options.rounds or DRAWS
    table = Table(f"Errors against float64, {draws} random models each", COLUMNS)
    for size in sizes:
        names = [f"{what}, {size} states" for what in ("logits", "gradients")]
        if not options.peers:
            table.rows += [not_measured(name, "not measured: --no-peers") for name in names]
            continue
        pairs = [errors_of(size, seed) for seed in range(draws)]
        for what, name in zip(("logits", "gradients"), names, strict=True):
            table.rows.append(row(name, [(ours[what], theirs[what]) for ours, theirs in pairs]))
    return table


def row(name: str, errors: list[tuple[float, float]]) -> Row:
    """The draws of one size."""
    ratios = [ours / theirs for ours, theirs in errors]
    return {
        "name": name,
        "ours": median(ours for ours, _ in errors),
        "theirs": median(theirs for _, theirs in errors),
        "reading": median(ratios),
        "worst": max(ratios),
    }


def errors_of(state_size: int, seed: int) -> tuple[Errors, Errors]:
    """Of one random model on one random text: ours, Transformers'."""
    from transformers import MambaForCausalLM as TheirModel

    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, state_size=state_size, use_cache=False
    )
    ours = MambaForCausalLM(config)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    theirs = TheirModel(config)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 97, (2, LENGTH))
    # Ours, for Transformers' computes A and the scan in float32 whatever the model's type.
    exact = results(copy.deepcopy(ours).double(), ids)
    return distance(results(ours, ids), exact), distance(results(theirs, ids), exact)


def results(model: nn.Module, ids: Tensor) -> Mapping[str, Tensor]:
    """The logits, and each weight's gradient of the loss, by names."""
    logits = model(ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    return {"logits": logits.detach()} | gradients


def distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Errors:
    """Root mean squares of the errors: of the logits, and over all gradients.

    Each gradient counts relative to its own size.
    """
    shares = {
        name: float((found[name].double() - exact[name]).norm() / exact[name].norm())
        for name in exact
    }
    logits = shares.pop("logits")
    gradients = (sum(share**2 for share in shares.values()) / len(shares)) ** 0.5
    return {"logits": logits, "gradients": gradients}


if __name__ == "__main__":
    main()
