"""The public surface on a GPU that is not there: nothing is left behind on the CPU.

The stand-in refuses operators over tensors of two devices, and notes each time the host waits.
"""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import anymamba
from anymamba import MambaCache, MambaForCausalLM, load_causal_lm
from anymamba.assets import bundled_model
from anymamba.cli.main import main
from anymamba.dropin.mamba_ssm.models.config_mamba import MambaConfig as OriginalConfig
from anymamba.dropin.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from anymamba.modeling import why_not_native_loop
from anymamba.modeling.adapters import patch_peft
from anymamba.modeling.generation import graph
from anymamba.training.data import TokenRow
from anymamba.training.pretrain.validation import loss_of_stream, loss_of_windows
from tests.modeling.test_quantized import write_folder as write_quantized_folder
from tests.parity.architectures import ARCHITECTURES
from tests.support.graphs import recorded
from tests.support.models import talkative_model, words
from tests.support.processes import assert_ends_well, run_python
from tests.support.stand_in_device import OnDevice, stand_in_device
from tests.support.tolerance import assert_same, naming

IDS = words(2, 7)
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1]])
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"input_ids": IDS},
    "mask": lambda: {"input_ids": IDS, "attention_mask": MASK, "labels": IDS},
    "labels": lambda: {"input_ids": IDS, "labels": IDS, "output_hidden_states": True},
    "shifted": lambda: {"input_ids": IDS, "shift_labels": IDS, "attention_mask": MASK},
    "seq_idx": lambda: {"input_ids": IDS, "seq_idx": MASK.cumsum(1), "labels": IDS},
    "offsets": lambda: {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 3, 7])},
    "positions": lambda: {
        "input_ids": IDS[:1],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]]),
        "labels": IDS[:1],
    },
    "some": lambda: {"input_ids": IDS, "logits_to_keep": torch.tensor([1, 5])},
    "long": lambda: {"input_ids": words(1, 600), "logits_to_keep": 2},  # in chunks on a CPU
}
CONTINUED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "mask": {"attention_mask": MASK},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "ends": {"eos_token_id": list(range(0, 61, 4))},
    "scores": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
}


def there(given: Any, device: str = "cuda") -> Any:
    """Tensors moved to the device."""
    if isinstance(given, Tensor):
        return given.to(device)
    if type(given) is dict:
        return {name: there(value, device) for name, value in given.items()}
    return given


def model_of(name: str) -> MambaForCausalLM:
    found: MambaForCausalLM = ARCHITECTURES[name].model(vocab_size=61)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_forward(name: str, way: str) -> None:
    model = model_of(name)
    expected = copy.deepcopy(model)(**WAYS[way]())
    given = WAYS[way]()
    with stand_in_device():
        model.to("cuda")
        found = model(**there(given))
        assert found.logits.device.type == "cuda"
        assert found.cache.device.type == "cuda"
        logits = found.logits.cpu()
        loss = None if found.loss is None else found.loss.cpu()
    assert_same(logits, expected.logits)
    if loss is not None:
        assert_same(loss, expected.loss)


@pytest.mark.slow
def test_backward() -> None:
    """In a process of its own: PyTorch looks for devices at its first backward pass alone."""
    program = "from tests.modeling.test_devices import backward; backward()"
    assert "done" in assert_ends_well(run_python("-c", program))


def backward() -> None:
    """Gradients of each architecture, on a type of device that needs no streams."""
    with stand_in_device() as notes:
        for name, way in itertools.product(ARCHITECTURES, ("labels", "mask", "seq_idx")):
            other, model = model_of(name).train(), model_of(name).train().to("xla")
            other(**WAYS[way]()).loss.backward()
            loss = model(**there(WAYS[way](), "xla")).loss
            forget(notes)
            loss.backward()
            assert notes.waits == [], (name, way)
            for (weight, ours), theirs in zip(
                model.named_parameters(), other.parameters(), strict=True
            ):
                assert ours.grad is not None
                assert ours.grad.device == ours.device
                with naming(f"{name}, {way}, {weight}"):
                    assert_same(ours.grad.cpu(), theirs.grad)
    print("done")


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_step_neither_waits_nor_uploads(name: str) -> None:
    """Such a step can be captured, and Python runs ahead of the GPU where it is not."""
    model = model_of(name)
    ids = words(2, 4)
    with stand_in_device() as notes:
        model.to("cuda")
        cache = MambaCache.for_model(model, 2)
        blocks = (cache.conv_states, cache.ssm_states, cache.token_counts)
        moved = ids.to("cuda")
        forget(notes)
        for at in range(4):
            logits = model(moved[:, at, None], cache=cache).logits
        assert notes.waits == []
        assert notes.uploads == []
        assert (cache.conv_states, cache.ssm_states, cache.token_counts) == blocks
        found = logits.cpu()
    assert_same(found[:, 0], model_of(name)(ids).logits[:, -1])


@pytest.mark.parametrize("way", CONTINUED)
def test_generate(way: str) -> None:
    model, options = talkative_model(), CONTINUED[way]
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given |= {"eos_token_id": None} | options
    expected = copy.deepcopy(model).generate(IDS, **given)
    with stand_in_device():
        model.to("cuda")
        found = model.generate(IDS.to("cuda"), **there(given))
        detailed = not isinstance(found, Tensor)
        sequences = (found.sequences if detailed else found).cpu()
    assert torch.equal(sequences, expected.sequences if detailed else expected)


@pytest.mark.parametrize("way", [*(name for name in CONTINUED if name != "beams"), "sampled"])
def test_captured_steps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our loop over tensors of the device; a recorder takes the place of its graphs."""
    model = talkative_model()
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given |= {"eos_token_id": None} | CONTINUED.get(way, {"do_sample": True, "top_k": 5})
    torch.manual_seed(0)
    expected = copy.deepcopy(model).generate(IDS, **given)
    captured: list[Tensor] = []

    def capture(step: Any, device: torch.device) -> Any:
        replay, result = recorded(step, device)
        captured.append(result)
        return replay, result

    with stand_in_device() as notes:
        monkeypatch.setitem(graph.CAPTURES, "cuda", capture)
        model.to("cuda")
        assert why_not_native_loop(model) is None
        ids = IDS.to("cuda")
        torch.manual_seed(0)
        found = model.generate(ids, **there(given))
        forget(notes)
        model.generate(ids, **there(given | {"max_new_tokens": 9}))
        if way in ("greedy", "sampled"):
            # One wait a token, to see whether all rows are done; a draw checks its probabilities.
            assert len(notes.waits) <= 9 * (1 if way == "greedy" else 2) + 4
        detailed = not isinstance(found, Tensor)
        sequences = (found.sequences if detailed else found).cpu()
        assert len(captured) == 1
        assert captured[0].device.type == "cuda"
    assert torch.equal(sequences, expected.sequences if detailed else expected)


@torch.no_grad()
def test_layers_on_two_devices_share_a_state() -> None:
    """As `device_map` divides a model: each layer's part of the state is fetched and put back."""
    model = talkative_model()
    expected = model(IDS).logits
    with stand_in_device():
        model.to("cuda")
        second = model.backbone.layers[1]
        second.to("xla")
        second.register_forward_pre_hook(lambda _, given: (given[0].to("xla"), *given[1:]))
        second.register_forward_hook(lambda _, given, output: output.to("cuda"))
        cache = MambaCache.for_model(model, 2)
        ids = IDS.to("cuda")
        parts = [model(ids[:, :3], cache=cache).logits]
        parts += [model(ids[:, at, None], cache=cache).logits for at in range(3, 7)]
        found = torch.cat(parts, 1).cpu()
    assert_same(found, expected)


def test_sampling_takes_few_waits() -> None:
    model = talkative_model()
    options: dict[str, Any] = {"do_sample": True, "top_k": 5, "eos_token_id": None}
    counts = []
    for tokens in (4, 8):
        with stand_in_device() as notes:
            model.to("cuda")
            ids = IDS.to("cuda")
            forget(notes)
            model.generate(ids, max_new_tokens=tokens, pad_token_id=0, **options)
            counts.append(len(notes.waits))
    assert counts[1] - counts[0] <= 2 * 4, "a wait to see whether all are done, and one to draw"


def test_a_text_goes_on_from_caches_that_moved(tmp_path: Path) -> None:
    model = talkative_model()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = copy.deepcopy(model).generate(IDS, max_new_tokens=6, **options)
    with torch.no_grad(), stand_in_device():
        model.to("cuda")
        cache = model(IDS[:, :4].to("cuda")).cache
        there_and_back = cache.to("cpu").to("cuda")
        fork = there_and_back.clone()
        fork.reorder_cache(torch.tensor([0, 1]))
        fork.save(tmp_path / "state.safetensors")
        loaded = MambaCache.load(tmp_path / "state.safetensors", model=model)
        for each in (cache, there_and_back, fork, loaded):
            assert each.device.type == "cuda"
            assert each.token_counts.cpu().tolist() == [4, 4]
            found = model.generate(IDS[:, 4:].to("cuda"), cache=each, max_new_tokens=6, **options)
            assert torch.equal(found.cpu(), whole[:, 4:])


def test_loading_with_a_device_map(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_causal_lm(bundled_model())(IDS).logits
    # Threads that load weights do not see the stand-in.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with torch.no_grad(), stand_in_device():
        model = load_causal_lm(bundled_model(), device_map="cuda:0")
        assert {weight.device.type for weight in model.parameters()} == {"cuda"}
        found = model(IDS.to("cuda")).logits.cpu()
    assert_same(found, expected)


@pytest.mark.parametrize(
    "places", ["auto", "cuda", "cuda:0", {"backbone": "cuda", "lm_head": "cuda:0"}]
)
def test_quantized_weights(places: Any, tmp_path: Path) -> None:
    write_quantized_folder(tmp_path)
    expected = MambaForCausalLM.from_pretrained(tmp_path)(IDS).logits
    with torch.no_grad(), stand_in_device() as notes:
        model = MambaForCausalLM.from_pretrained(tmp_path, device_map=places)
        assert model.device.type == "cuda"
        ids = IDS.to("cuda")
        forget(notes)
        logits = model(ids).logits
        assert (notes.waits, notes.uploads) == ([], [])
        found = logits.cpu()
    assert_same(found, expected)


def test_pipelines() -> None:
    model = load_causal_lm(bundled_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_model())
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}

    def text(device: Any) -> str:
        made = transformers.pipeline(
            "text-generation", model=model, tokenizer=tokenizer, device=device
        )
        return str(made(["ROMEO:", "O"], batch_size=2, **options))

    expected = text("cpu")
    with stand_in_device():
        assert text(0) == expected
        assert model.device.type == "cuda"


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = talkative_model()
    config = peft.LoraConfig(
        target_modules=["in_proj", "x_proj", "out_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    undo = patch_peft()
    try:
        adapted = peft.get_peft_model(model, config).eval()
    finally:
        undo()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = adapted.generate(input_ids=IDS, pad_token_id=0, **options)
    with stand_in_device():
        adapted.to("cuda")
        found = adapted.generate(input_ids=IDS.to("cuda"), pad_token_id=0, **options)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_the_drop_in(layer: str) -> None:
    settings = {"layer": layer} | ({"headdim": 16} if layer == "Mamba2" else {})
    config = OriginalConfig(d_model=32, n_layer=2, vocab_size=61, ssm_cfg=settings)
    model = MambaLMHeadModel(config)
    logits, text = model(IDS).logits, model.generate(IDS, max_length=12)
    with torch.no_grad(), stand_in_device() as notes:
        model.to("cuda")
        ids = IDS.to("cuda")
        forget(notes)
        found, written = model(ids).logits, model.generate(ids, max_length=12)
        assert (notes.waits, notes.uploads) == ([], [])
        assert torch.equal(written.cpu(), text)
        found = found.cpu()
    assert_same(found, logits)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--max-new-tokens", "5", "--temperature", "0", "ROMEO:"]
    assert main([*arguments, "--device", "cpu"]) == 0
    expected = capsys.readouterr().out
    with stand_in_device() as notes:
        assert main([*arguments, "--device", "cuda"]) == 0
        assert notes.uploads, "the model was not moved"
    assert capsys.readouterr().out == expected


def test_states_of_the_runtime() -> None:
    engine = anymamba.load()
    state = engine.prefill(engine.state(), "ROMEO:")
    config = anymamba.MambaConfig.from_pretrained(bundled_model())
    with stand_in_device():
        cache = MambaCache.from_state(state, config, device="cuda")
        assert cache.device.type == "cuda"
        back = cache.to_state(engine)
    assert back.token_count == state.token_count
    np.testing.assert_array_equal(back.ssm_states, state.ssm_states)


def test_validation_of_a_training() -> None:
    model = load_causal_lm(bundled_model())
    row = TokenRow(np.arange(70, dtype=np.uint16) % 60, [0, 30])
    expected = (loss_of_windows(model, row, 16), loss_of_stream(model, row, 32))
    with stand_in_device():
        model.to("cuda")
        found = (loss_of_windows(model, row, 16), loss_of_stream(model, row, 32))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.count == theirs.count
        assert ours.mean == pytest.approx(theirs.mean, rel=1e-5)


def forget(notes: OnDevice) -> None:
    notes.waits.clear()
    notes.uploads.clear()
