"""A program: a capture fails, the text comes all the same, and then all works on.

Run with what the step waits for, "number" or "mask", and the device.
"""

import sys
from unittest.mock import patch

import torch
from torch import Tensor

from anymamba import MambaForCausalLM
from anymamba.modeling import why_not_native_loop
from anymamba.modeling.generation import graph, why_not_graph
from tests.gpu.test_graphs import assert_same_text, written
from tests.support.graphs import recorded
from tests.support.models import talkative_model


def main(kind: str, device: torch.device) -> None:
    """Fail, and see what works after that."""
    if device.type == "cpu":
        graph.CAPTURES["cpu"] = recorded
    logits = MambaForCausalLM._logits

    def waits(self: MambaForCausalLM, hidden: Tensor) -> Tensor:
        # The second waits inside of an operator, which shows only while it is captured.
        waited = hidden.sum().item() if kind == "number" else hidden[hidden > 0].shape[0]
        assert waited != 0.5
        return logits(self, hidden)

    expected = written(talkative_model().to(device))
    with patch.object(MambaForCausalLM, "_logits", waits):
        model = talkative_model().to(device)
        for _ in range(2):
            assert_same_text(written(model), expected)
        assert str(why_not_native_loop(model)).startswith("capturing a step failed: ")
        assert "previous error" not in str(why_not_native_loop(model))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    torch.rand(3, device=device).multinomial(1)
    other = talkative_model().to(device)
    assert_same_text(written(other, do_sample=True, top_k=1), expected)
    assert why_not_graph(other) is None, "a capture failed"


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
