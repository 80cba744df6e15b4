"""`anymamba generate` through PyTorch: on another device, or without the native core."""

import shutil

import pytest
import torch

from anymamba import MambaForCausalLM
from anymamba.cli.commands.text import generate
from tests.support.files import write_model
from tests.support.reference import greedy


@pytest.fixture
def without_core(monkeypatch):
    """An installation that was made without a compiler."""

    def find_spec(name):
        return None if name == "anymamba._core" else found(name)

    found = generate.find_spec
    monkeypatch.setattr(generate, "find_spec", find_spec)


def test_pytorch_stands_in_and_says_so(tiny, without_core, anymamba):
    options = ("--model", tiny, "--temperature", 0, "--max-new-tokens", 12, "--json")
    done = anymamba("generate", "To be", *options)
    assert done.json["new_tokens"] == greedy(tiny, "To be", 12)
    assert done.json["ended_by"] == "length"
    assert "PyTorch computes" in done.err
    assert done.err.count("\n") == 1


def test_text_comes_as_it_does_from_the_runtime(tiny, without_core, anymamba):
    options = ("--model", tiny, "--temperature", 0, "--max-new-tokens", 20)
    done = anymamba("generate", "To be", "--echo", *options)
    text = bytes(greedy(tiny, "To be", 20)).decode(errors="replace")
    assert done.out == "To be" + text.removesuffix("\n") + "\n"
    assert "new: 20 tokens" in done.err


def test_stop_strings_and_end_tokens(tiny, tmp_path, without_core, anymamba):
    tokens = greedy(tiny, "a", 30)
    at = next(i for i in range(2, 30) if tokens[i] < 128 and tokens[i] not in tokens[:i])
    options = ("--temperature", 0, "--json")
    stopped = anymamba("generate", "a", "--model", tiny, *options, "--stop", chr(tokens[at])).json
    assert (stopped["new_tokens"], stopped["ended_by"]) == (tokens[: at + 1], "stop")
    folder = write_model(tmp_path, eos_token_id=tokens[at], pad_token_id=tokens[at])
    ended = anymamba("generate", "a", "--model", folder, *options).json
    assert (ended["new_tokens"], ended["ended_by"]) == (tokens[: at + 1], "end")


def test_a_seed_repeats_the_text(tiny, without_core, anymamba):
    command = ("generate", "a", "--model", tiny, "--max-new-tokens", 20, "--seed", 5, "--json")
    assert anymamba(*command).json["new_tokens"] == anymamba(*command).json["new_tokens"]


def test_weights_are_computed_in_the_type_asked_for(
    tiny, tmp_path, without_core, monkeypatch, anymamba
):
    types = []

    class Stop(Exception):
        pass

    def look(model, *arguments):
        types.append({weight.dtype for weight in model.parameters()})
        raise Stop

    monkeypatch.setattr("anymamba.cli.torch_generation.write", look)
    narrow = tmp_path / "narrow"
    MambaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(narrow)
    shutil.copy(tiny / "tokenizer.json", narrow)
    for options in (
        [],
        ["--dtype", "float32"],
        ["--weights", "f32"],
        ["--dtype", "bfloat16"],
        ["--weights", "bf16"],
        ["--dtype", "float16"],
    ):
        with pytest.raises(Stop):
            anymamba("generate", "a", "--model", narrow, *options)
    wide, half, float16 = {torch.float32}, {torch.bfloat16}, {torch.float16}
    assert types == [wide, wide, wide, half, half, float16]


@pytest.mark.parametrize(
    "option",
    [
        ("--weights", "int8"),
        ("--state", "a.state"),
        ("--save-state", "a.state"),
        ("--presence-penalty", "1"),
        ("--frequency-penalty", "1"),
        ("--logit-bias", "1=1"),
        ("--stop-id", "1"),
    ],
)
def test_what_only_the_runtime_does_is_refused(option, tiny, without_core, anymamba):
    complaint = anymamba("generate", "a", "--model", tiny, *option, "--device", "cpu:0").complaint
    assert option[0] in complaint
    assert "native core" in complaint


@pytest.mark.parametrize("device", ["abacus", "meta", "9", "1" * 30])
def test_a_device_that_does_not_exist_is_refused(device, tiny, anymamba):
    assert device in anymamba("generate", "a", "--model", tiny, "--device", device).complaint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_refused(tiny, anymamba):
    assert "cuda" in anymamba("generate", "a", "--model", tiny, "--device", "cuda").complaint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_writes_the_same(tiny, anymamba):
    options = ("--model", tiny, "--temperature", 0, "--max-new-tokens", 12, "--json")
    done = anymamba("generate", "To be", *options, "--device", "cuda").json
    assert done["new_tokens"] == greedy(tiny, "To be", 12)


def test_an_empty_prompt_begins_with_the_first_token_of_texts(
    tmp_path, tiny, without_core, anymamba
):
    folder = write_model(tmp_path, bos_token_id=65)
    options = ("--max-new-tokens", 4, "--temperature", 0, "--json")
    result = anymamba("generate", "", "--model", folder, *options).json
    assert result["prompt_tokens"] == [65]
    assert result["new_tokens"] == greedy(tiny, "A", 4)
