"""What `inspect` says of a text, against `minimal.py`'s own recurrence and Transformers' model."""

from typing import Any

import numpy as np
import pytest

import anymamba
from anymamba.errors import InputError
from anymamba.runtime.analysis.inspection import Inspection, inspect

LENGTH = 13
# Both compute in float32, the sums in float64: a whole model's tolerance in relative terms.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(3).integers(0, 61, LENGTH).tolist()


@pytest.fixture(scope="module")
def found(folder: Any, ids: list[int]) -> Inspection:
    return inspect(anymamba.load(folder), ids, ages=[3, 5])


@pytest.fixture(scope="module")
def scans(folder: Any, ids: list[int]) -> list[tuple[Any, ...]]:
    """What each layer's scan reads in `minimal.py`, which computes it in its own way."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from anymamba.minimal import Mamba, MambaBlock, ModelArgs

    model = Mamba(ModelArgs(24, 2, 61, d_state=5, dt_rank=3, pad_vocab_size_multiple=1))
    tensors = load_file(folder / "model.safetensors")
    tensors = {n.replace("backbone.", "").replace("embeddings", "embedding"): t
               for n, t in tensors.items()}  # fmt: skip
    missing = model.load_state_dict(tensors, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    read = []
    scan = MambaBlock.selective_scan

    def watched(block: Any, *arguments: Any) -> Any:
        read.append(tuple(argument.double() for argument in arguments))
        return scan(block, *arguments)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(MambaBlock, "selective_scan", watched)
        model(torch.tensor([ids]))
    return read


def left_of(token: int, read: tuple[Any, ...]) -> list[float]:
    """The size of what a token leaves, step by step: a recurrence that nothing else writes to."""
    x_ble, delta_ble, A_en, B_bln, *_ = read
    state_en = (delta_ble[0, token, :, None] * B_bln[0, token] * x_ble[0, token, :, None]).abs()
    sizes = [float(state_en.sum())]
    for later in range(token + 1, x_ble.shape[1]):
        state_en = (delta_ble[0, later, :, None] * A_en).exp() * state_en
        sizes.append(float(state_en.sum()))
    return sizes


def test_what_is_left_is_what_the_recurrence_leaves(
    found: Inspection, scans: list[tuple[Any, ...]]
) -> None:
    assert found.ages == (0, 1, 2, 3, 4, 5, 8)
    for layer, read in enumerate(scans):
        for token in range(LENGTH):
            sizes = left_of(token, read)
            for index, age in enumerate(found.ages):
                expected = sizes[age] if age < len(sizes) else np.nan
                got = found.left_yal[layer, index, token]
                np.testing.assert_allclose(got, expected, **CLOSE)
            np.testing.assert_allclose(found.final_yl[layer, token], sizes[-1], **CLOSE)


def test_step_sizes_are_those_of_transformers(
    folder: Any, ids: list[int], found: Inspection
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.models.mamba.modeling_mamba.MambaForCausalLM.from_pretrained(folder)
    seen: list[Any] = []
    for block in model.backbone.layers:
        block.mixer.x_proj.register_forward_hook(lambda *_: seen.append(_[-1]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for layer, (block, output) in enumerate(zip(model.backbone.layers, seen, strict=True)):
        step = block.mixer.dt_proj(output[0, :, :3])  # of rank 3; what is left are B and C
        expected = torch.nn.functional.softplus(step).mean(dim=-1).detach()
        np.testing.assert_allclose(found.step_sizes_yl[layer], expected, **CLOSE)


def test_shares_and_averages(found: Inspection) -> None:
    """The definitions, once more over plain lists."""
    left = found.left_yal
    for layer in range(2):
        total = sum(found.final_yl[layer])
        for token in range(LENGTH):
            assert found.final_share_yl[layer, token] == pytest.approx(
                found.final_yl[layer, token] / total
            )
            assert found.retention_yal[layer, 0, token] == 1
        alive = [left[layer, 4, token] for token in range(LENGTH - 4)]
        assert found.held_yl(4)[layer, 2] == pytest.approx(alive[2] / (sum(alive) / len(alive)))
        written = [left[layer, 0, token] for token in range(LENGTH - 4)]
        assert found.forgetting_ya()[layer, 4] == pytest.approx(sum(alive) / sum(written))
    shares = found.retention_yal
    assert (np.diff(shares[:, :, : LENGTH - 8], axis=1) < 0).all()  # nothing comes back


def test_channels_in_blocks_are_the_same(
    folder: Any, ids: list[int], found: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "anymamba.runtime.analysis.inspection._BLOCK", 5 * LENGTH * 7
    )  # 7 of 48 channels
    again = inspect(anymamba.load(folder), ids, ages=[3, 5])
    # The same float64 numbers added in another order.
    np.testing.assert_allclose(again.left_yal, found.left_yal, rtol=1e-12)
    np.testing.assert_allclose(again.final_yl, found.final_yl, rtol=1e-12)


def test_weights_in_few_bits_are_looked_at_as_they_are_used() -> None:
    """Eight bits of 256 levels move step sizes by some thousandths."""
    ids = list(b"To be, or not to be")
    whole = inspect(anymamba.load(), ids)
    rounded = inspect(anymamba.load(weights="int8"), ids)
    np.testing.assert_allclose(rounded.step_sizes_yl, whole.step_sizes_yl, rtol=0.1)
    assert (rounded.step_sizes_yl != whole.step_sizes_yl).any()


@pytest.mark.parametrize(
    ("ids", "ages", "reason"),
    [([], [], "empty"), ([1, 61], [], "token 61"), ([1, 2], [2], "2 steps"), ([1], [-1], "-1")],
)
def test_what_cannot_be_looked_at(
    ids: list[int], ages: list[int], reason: str, folder: Any
) -> None:
    with pytest.raises(InputError, match=reason):
        inspect(anymamba.load(folder), ids, ages)


def test_one_token_alone(folder: Any) -> None:
    found = inspect(anymamba.load(folder), [7])
    assert found.ages == (0,)
    assert found.final_share_yl.tolist() == [[1.0], [1.0]]
