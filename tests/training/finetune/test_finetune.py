"""Fine-tuning in the library: which tokens count, what is written, and how it ends early."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import anymamba
from anymamba.errors import CheckpointError, ConfigError, InputError, TrainingError

pytest.importorskip("trl")

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from anymamba.assets import bundled_model
from anymamba.runtime.convert.quantizing import quantize_checkpoint
from anymamba.training.finetune import FinetuneSettings, finetune
from anymamba.training.pretrain.run import train
from tests.support.files import write_model
from tests.support.tolerance import assert_same
from tests.support.training import small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def write_lines(file: Path, *lines: Any) -> list[str]:
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return [str(file)]


def test_only_answers_count(tiny: Path, tmp_path: Path) -> None:
    """The loss is that of the answers' bytes, which the runtime scores one by one."""
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "xyz"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "uvw"},
    ]
    data = write_lines(tmp_path / "talk.jsonl", {"messages": messages})
    settings = FinetuneSettings(rank=1, max_steps=1, batch_size=1)
    figures = finetune(data, tmp_path / "new", tiny, settings, validation=data)
    engine = anymamba.load(tiny)
    nats = []
    before = ""
    for ask, answer in (("hi", " xyz"), ("so", " uvw")):
        before += f"User: {ask}\nAssistant:"
        # The end token of a tokenizer without one is token 0; the template ends the line.
        ids = [*before.encode(), *answer.encode(), 0, ord("\n")]
        score = engine.score(ids)
        nats.append(-score.logprobs[len(before.encode()) - 1 :].mean())
        before += answer + "\0\n"
    assert figures["examples"] == 2
    # Two examples of as many tokens, a batch each. Two float32 programs of one formula.
    assert figures["validation_before"] == pytest.approx(np.mean(nats), rel=1e-5)


def test_texts_count_as_a_whole(tiny: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "text.jsonl", {"text": "To be, or not"})
    settings = FinetuneSettings(rank=1, max_steps=1, batch_size=1)
    figures = finetune(data, tmp_path / "new", tiny, settings, validation=data)
    score = anymamba.load(tiny).score([*b"To be, or not", 0])
    assert figures["validation_before"] == pytest.approx(-score.logprobs.mean(), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_what_was_written(method: str, tiny: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", {"prompt": "ab=", "completion": "xyz"})
    settings = FinetuneSettings(method, rank=2, alpha=5, max_steps=3, learning_rate=0.01)
    finetune(data, tmp_path / "new", tiny, settings)
    fields = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tiny.resolve())
    assert (fields["r"], fields["lora_alpha"]) == (2, 5)
    anymamba.register()
    try:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "new"
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
        ids = tokenizer("ab=xyz", return_tensors="pt").input_ids
        expected = model(ids).logits[0].detach().numpy()
    finally:
        anymamba.unregister()
    found = anymamba.load(adapter=tmp_path / "new").logits(ids[0].tolist())
    assert_same(found, expected)


def test_a_signal_ends_it_and_what_was_learned_is_kept(tiny: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", {"prompt": "ab=", "completion": "xyz"})

    def end(done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = FinetuneSettings(rank=1, max_steps=50)
    figures = finetune(data, tmp_path / "new", tiny, settings, progress=end)
    assert (figures["steps"], figures["stopped_by"]) == (2, "SIGTERM")
    assert anymamba.load(adapter=tmp_path / "new").generate("a", max_new_tokens=1).ids


def test_the_end_of_a_turn_ends_answers(tiny: Path, tmp_path: Path) -> None:
    """A template may end an answer with another special token than that of texts."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    symbols = tokenizer.convert_ids_to_tokens([1, 2])
    tokenizer.add_special_tokens(
        {"eos_token": symbols[0], "additional_special_tokens": symbols[1:]}
    )
    tokenizer.save_pretrained(model)
    turn = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}" + symbols[1] + "{% endfor %}"
    )
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_lines(tmp_path / "a.jsonl", {"messages": said})
    settings = FinetuneSettings(rank=1, max_steps=1, chat_template=turn)
    finetune(data, tmp_path / "new", model, settings)
    assert anymamba.load(adapter=tmp_path / "new").end_ids == (1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "lore"},
        {"rank": 0},
        {"targets": ["conv1d"]},
        {"targets": []},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"alpha": float("inf")},
        {"epochs": float("nan")},
        {"seed": -1},
        {"seed": 2**32},
        {"adapter_dropout": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FinetuneSettings(**wrong)


def test_answers_that_are_all_cut_off_are_refused(tiny: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", {"prompt": "long", "completion": "b"})
    with pytest.raises(InputError, match=r"within its first 4 tokens: .*--max-length"):
        finetune(data, tmp_path / "new", tiny, FinetuneSettings(max_length=4))
    assert not (tmp_path / "new").exists()


def test_a_model_without_a_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((tiny / name).read_bytes())
    data = write_lines(tmp_path / "a.jsonl", {"text": "abc"})
    with pytest.raises(CheckpointError, match=r"no tokenizer can be read from .*model'"):
        finetune(data, tmp_path / "new", model)


def test_a_dataset_counts_as_files_do(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    pairs = [{"prompt": f"{n}=", "completion": str(n)} for n in range(4)]
    data = write_lines(tmp_path / "set" / "a.jsonl", *pairs)
    settings = FinetuneSettings(rank=1, max_steps=3)
    files = finetune(data, tmp_path / "one", tiny, settings)
    folder = str(tmp_path / "set")
    dataset = finetune((), tmp_path / "two", tiny, settings, dataset=folder)
    assert dataset["loss_last"] == files["loss_last"]
    with pytest.raises(InputError, match="either files of examples"):
        finetune(data, tmp_path / "new", tiny, settings, dataset=folder)
    with pytest.raises(InputError, match="there is no dataset"):
        finetune((), tmp_path / "new", tiny, settings, dataset=folder, dataset_split="test")
    write_lines(tmp_path / "set" / "a.jsonl", {"question": "a"})
    with pytest.raises(InputError, match=r"row 0 of the dataset .* has none of messages"):
        finetune((), tmp_path / "new", tiny, settings, dataset=folder)


TEXTS = [{"text": f"{number} and {number}"} for number in range(12)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_goes_on_from_a_checkpoint_to_the_same_weights(
    method: str, tiny: Path, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "a.jsonl", *TEXTS)
    settings = FinetuneSettings(
        method=method, rank=2, max_steps=9, batch_size=2, adapter_dropout=0.2, learning_rate=1e-2
    )
    whole = finetune(data, tmp_path / "whole", tiny, settings)

    def killed(step: int, _: int) -> None:
        if step == 7:
            raise RuntimeError("killed")

    new, checkpoints = tmp_path / "new", tmp_path / "new.checkpoints"
    with pytest.raises(RuntimeError, match="killed"):
        finetune(data, new, tiny, settings, save_every=2, progress=killed)
    assert sorted(place.name for place in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert not new.exists()
    with pytest.raises(InputError, match="holds the checkpoints of a run"):
        finetune(data, new, tiny, settings)
    other = FinetuneSettings(method=method, rank=2, max_steps=9, batch_size=3)
    with pytest.raises(TrainingError, match=r"checkpoint-6' is of a run with other .*batch_size"):
        finetune(data, new, tiny, other, resume=True)
    steps: list[int] = []
    resumed = finetune(
        data,
        new,
        tiny,
        settings,
        save_every=2,
        resume=True,
        progress=lambda *at: steps.append(at[0]),
    )
    assert steps == [7, 8, 9]
    for figure in ("loss_first", "loss_last", "steps"):
        assert resumed[figure] == whole[figure]
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    ours, theirs = (load_file(place / name) for place in (new, tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert not checkpoints.exists()
    with pytest.raises(InputError, match="nothing to go on with"):
        finetune(data, new, tiny, settings, resume=True, overwrite=True)


def test_a_signal_leaves_a_checkpoint_too(tiny: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", *TEXTS)
    settings = FinetuneSettings(rank=1, max_steps=6, batch_size=2)

    def stop(step: int, _: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    figures = finetune(data, tmp_path / "new", tiny, settings, save_every=100, progress=stop)
    assert figures["stopped_by"] == "SIGTERM"
    (saved,) = (tmp_path / "new.checkpoints").iterdir()
    assert saved.name == f"checkpoint-{figures['steps']}"
    more = finetune(data, tmp_path / "new", tiny, settings, resume=True, overwrite=True)
    assert more["steps"] == 6


@pytest.mark.parametrize(
    "name", ["finetune.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"]
)
def test_a_broken_checkpoint_is_named(name: str, tiny: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", *TEXTS)
    settings = FinetuneSettings(rank=1, max_steps=4)

    def killed(step: int, _: int) -> None:
        if step == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        finetune(data, tmp_path / "new", tiny, settings, save_every=1, progress=killed)
    file = tmp_path / "new.checkpoints" / "checkpoint-1" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(TrainingError, match=rf"cannot go on from .*checkpoint-1'.*{name}"):
        finetune(data, tmp_path / "new", tiny, settings, resume=True)


def test_weights_of_8_bits_are_not_trained(tmp_path: Path) -> None:
    quantize_checkpoint(bundled_model(), tmp_path / "model", "int8")
    data = write_lines(tmp_path / "a.jsonl", {"text": "abc"})
    with pytest.raises(ConfigError, match=r"model' keeps its weights in 8 bits"):
        finetune(data, tmp_path / "new", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model' keeps its weights in 8 bits"):
        train(small(tmp_path, model=str(tmp_path / "model")))
    assert not (tmp_path / "run").exists()
