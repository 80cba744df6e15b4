"""Programs that name "cuda" get the CPU where there is none, and are told so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from anymamba.dropin.cuda_on_cpu import CudaOnCpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


def test_what_goes_to_cuda_is_on_the_cpu(tmp_path: Path) -> None:
    load, synchronize = torch.load, torch.cuda.synchronize
    said: list[str] = []
    with CudaOnCpu(said.append):
        x = torch.arange(3.0)
        assert x.to("cpu", torch.float16).dtype == torch.float16
        assert said == []
        device = torch.device("cuda", 0)
        moved = [
            x.cuda(),
            x.to("cuda"),
            x.to(device, torch.float64),
            x.to(device="cuda:0"),
            x.new_zeros(2, device="cuda"),
            torch.zeros(2, device=device),
            torch.tensor([1.0], device="cuda"),
            torch.ones_like(x, device="cuda"),
        ]
        with torch.device("cuda"):
            moved.append(torch.zeros(2))
        for layer in (
            nn.Linear(3, 2).cuda(),
            nn.Linear(3, 2).to("cuda"),
            nn.Linear(3, 2, device=device),
        ):
            moved += [layer.weight, layer(x.cuda())]
        torch.save(x, tmp_path / "x.pt")
        moved.append(torch.load(tmp_path / "x.pt", map_location="cuda"))
        torch.cuda.synchronize()
        assert {y.device.type for y in moved} == {"cpu"}
        assert moved[2].dtype == torch.float64
        assert torch.equal(moved[0], x)
    assert said == ["no CUDA here: what this program puts there is on the CPU"]
    assert (torch.load, torch.cuda.synchronize) == (load, synchronize)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_other_devices_and_other_words_stay() -> None:
    with CudaOnCpu(pytest.fail):
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.einsum("i,i->", torch.ones(2), torch.ones(2)) == 2
