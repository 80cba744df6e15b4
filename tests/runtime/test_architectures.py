"""One contract for every architecture: each way through the runtime gives the model's logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anymamba
from anymamba import ops
from anymamba.errors import ConfigError, StateError
from anymamba.modeling.auto import load_causal_lm
from anymamba.runtime.analysis import inspect
from anymamba.runtime.convert import convert, quantize_checkpoint
from anymamba.runtime.generation import PromptScores
from tests.support.files import write_folder
from tests.support.reference import words
from tests.support.tolerance import assert_same

# What each adds to a config; an epsilon far from the default shows where it is lost.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {"mixer_rms_eps": 0.125},
    "mamba2": {"layer_norm_epsilon": 0.125},
    "mamba2, normed before the gate": {"gate_after_norm": True},
    "mamba2, not normed": {"use_gated_norm": False},
}
NOT_IN_GGUF = ("mamba2, normed before the gate", "mamba2, not normed")
IDS = words(70)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"model_type": name.split(",")[0], **ARCHITECTURES[name]}
    return write_folder(tmp_path_factory.mktemp(name) / "model", **fields)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_causal_lm(folder)


@torch.no_grad()
def logits_of(model: Any, ids: list[int] = IDS) -> np.ndarray:
    """Through the modules, one operator at a time."""
    with ops.backend("reference"):
        return model(torch.tensor([ids])).logits[0].float().numpy()


def test_a_folder(folder: Path, model: Any) -> None:
    assert_same(anymamba.load(folder).logits(IDS), logits_of(model))


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_prompts_are_scored_in_their_row(folder: Path, weights: str) -> None:
    """Beside another text and in parts, each token as the logits before it say."""
    engine = anymamba.load(folder, weights=weights)
    batch, scores = engine.batch(rows=3, chunk_tokens=16), PromptScores(2)
    other = np.array(IDS[::-1])
    batch.add(0, other, None)
    batch.add(2, np.array(IDS), None, (), scores)
    while batch.rows:
        batch.step()
    logits_lv = engine.logits(IDS).astype(np.float64)
    logprobs_lv = logits_lv - np.log(np.exp(logits_lv).sum(axis=1, keepdims=True))
    expected = logprobs_lv[np.arange(len(IDS) - 1), IDS[1:]]
    # Logits of a few units in float32, through another number of rows' products.
    np.testing.assert_allclose(np.float64(scores.logprobs[1:]), expected, atol=1e-4)
    for row, ids in ((0, other.tolist()), (2, IDS)):
        assert_same(batch.blocks.logits[row], engine.logits(ids)[-1])


@pytest.mark.parametrize(("weights", "tolerance"), [("f32", 1e-4), ("f16", 2e-2), ("bf16", 2e-2)])
def test_gguf(
    folder: Path, name: str, model: Any, tmp_path: Path, weights: str, tolerance: float
) -> None:
    if name in NOT_IN_GGUF:
        (option,) = ARCHITECTURES[name]
        with pytest.raises(ConfigError, match=f"this one has .*{option}"):
            convert(folder, tmp_path / "model.gguf", "gguf", weights)
        return
    file = convert(folder, tmp_path / "model.gguf", "gguf", weights)
    assert_same(anymamba.load(file).logits(IDS), logits_of(model), tolerance)
    assert_same(logits_of(load_causal_lm(file)), logits_of(model), tolerance)
    again = convert(file, tmp_path / "back", "transformers", "f32")
    assert_same(anymamba.load(again).logits(IDS), logits_of(model), tolerance)


def test_llama_cpp_computes_the_same(folder: Path, name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    if name in NOT_IN_GGUF:
        pytest.skip("llama.cpp has no such model")
    config = json.loads((folder / "config.json").read_text())
    # llama.cpp takes the epsilon of the layers' norms for those of dt, B and C too.
    config["layer_norm_epsilon"] = config.get("mixer_rms_eps", 1e-5)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    file = convert(tmp_path / "model", tmp_path / "model.gguf", "gguf", "f32")
    llama = llama_cpp.Llama(str(file), logits_all=True, n_ctx=128, verbose=False)
    llama.eval(IDS)
    expected = np.array(llama.scores[: len(IDS)])
    assert_same(anymamba.load(file).logits(IDS), expected)


@pytest.mark.parametrize(
    ("weights", "calibrated"), [("int8", False), ("int8", True), ("int4", True)]
)
def test_quantized(folder: Path, tmp_path: Path, weights: str, calibrated: bool) -> None:
    calibrate = IDS if calibrated else None
    quantized = quantize_checkpoint(folder, tmp_path / "q", weights, group=32, calibrate=calibrate)
    # Both round activations to 8 bits; one that falls on the other side moves whole logits.
    expected = logits_of(load_causal_lm(quantized))
    assert_same(anymamba.load(quantized).logits(IDS), expected, 2e-2)


def test_states(folder: Path, name: str, model: Any, tmp_path: Path) -> None:
    engine = anymamba.load(folder)
    state = engine.prefill(engine.state(), IDS[:30])
    state.save(tmp_path / "state.safetensors")
    found = engine.load_state(tmp_path / "state.safetensors")
    assert_same(engine.logits(IDS[30:], found), logits_of(model)[30:])
    other = write_folder(
        tmp_path / "other", model_type={"mamba": "falcon_mamba"}.get(name, "mamba")
    )
    with pytest.raises(StateError, match="model_type"):
        anymamba.load(other).load_state(tmp_path / "state.safetensors")


def test_a_batch_reads_as_its_rows_alone(folder: Path) -> None:
    engine = anymamba.load(folder)
    prompts = [IDS[:3], IDS[:40], IDS[7:8]]
    together = engine.generate_batch(prompts, temperature=0, max_new_tokens=5)
    alone = [engine.generate(prompt, temperature=0, max_new_tokens=5) for prompt in prompts]
    assert [output.ids for output in together] == [output.ids for output in alone]


def test_inspection_sees_the_same_step_sizes(folder: Path, model: Any) -> None:
    found = inspect(anymamba.load(folder), IDS)
    sizes = []
    for block in model.backbone.layers:

        def record(
            inputs: Any, *rest: Any, run: Any = block.mixer._scan_from, mixer: Any = block.mixer
        ) -> Any:
            # Mamba-2's mixer has bias and limits itself.
            bias = getattr(mixer, "dt_bias", inputs[-1])
            low, high = getattr(mixer, "time_step_limit", (0.0, float("inf")))
            delta = torch.nn.functional.softplus(inputs[1] + bias).clamp(low, high)
            sizes.append(delta.mean(-1)[0])
            return run(inputs, *rest)

        block.mixer._scan_from = record
    try:
        logits_of(model)
    finally:
        for block in model.backbone.layers:
            del block.mixer._scan_from
    assert_same(found.step_sizes_yl, torch.stack(sizes).numpy())
