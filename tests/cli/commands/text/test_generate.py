"""`anymamba generate`: what it writes, and what it refuses."""

import json
import re
import shutil
import sys

import pytest
from tokenizers import Tokenizer

from anymamba.assets import bundled_model
from anymamba.cli.load_engine import open_engine
from tests.support.files import write_model
from tests.support.reference import greedy


def test_temperature_0_takes_the_likeliest_tokens(tiny, anymamba):
    result = anymamba(
        "generate", "To be", "--model", tiny, "--temperature", 0, "--max-new-tokens", 12, "--json"
    ).json
    assert result["new_tokens"] == greedy(tiny, "To be", 12)
    assert result["prompt_tokens"] == list(b"To be")
    assert result["prompt"] == "To be"
    assert result["text"] == bytes(result["new_tokens"]).decode("utf-8", errors="replace")
    assert result["ended_by"] == "length"
    assert result["model"] == str(tiny)


def test_the_bundled_model_is_the_default_and_the_text_ends_its_line(anymamba):
    plain = anymamba("generate", "ROMEO:", "--seed", 1, "--max-new-tokens", 40)
    result = anymamba("generate", "ROMEO:", "--seed", 1, "--max-new-tokens", 40, "--json").json
    assert plain.out.removesuffix("\n") == result["text"].removesuffix("\n")
    assert plain.out.endswith("\n")
    assert not plain.out.endswith("\n\n")
    assert result["model"] == "bundled"
    assert len(result["text"]) == 40


def test_figures_are_one_line_on_standard_error(tiny, anymamba):
    done = anymamba("generate", "abc", "--model", tiny, "--max-new-tokens", 5)
    assert done.status == 0
    speed = r"[\d.]+ tokens/s"
    line = rf"prompt: 3 tokens, {speed}; new: 5 tokens, {speed}; peak memory: \d+ MB\n"
    assert re.fullmatch(line, done.err)


def test_json_is_all_there_is(tiny, anymamba):
    done = anymamba("generate", "abc", "--model", tiny, "--max-new-tokens", 1, "--json")
    assert done.err == ""
    assert done.out.count("\n") == 1
    figures = done.json["figures"]
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (3, 1)
    # The only new token came out of reading the prompt: there is no speed to tell.
    assert figures["new_tokens_per_second"] is None
    assert figures["prompt_tokens_per_second"] > 0
    assert figures["peak_memory_bytes"] > 1e6


def test_echo_shows_the_prompt_first(tiny, anymamba):
    options = ("--model", tiny, "--max-new-tokens", 5, "--seed", 3)
    alone = anymamba("generate", "abc", *options)
    echoed = anymamba("generate", "abc", "--echo", *options)
    assert echoed.out == "abc" + alone.out


def test_a_seed_repeats_the_text(tiny, anymamba):
    def text(*options):
        command = ("generate", "a", "--model", tiny, "--max-new-tokens", 20, "--json", *options)
        return anymamba(*command).json

    first = text("--seed", 5)
    assert text("--seed", 5)["new_tokens"] == first["new_tokens"]
    assert text("--seed", 6)["new_tokens"] != first["new_tokens"]
    # Without a seed one is drawn, and named, so that any text can be had again.
    drawn = text()
    assert text("--seed", drawn["seed"])["new_tokens"] == drawn["new_tokens"]


@pytest.mark.parametrize("option", [("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)])
def test_options_that_leave_one_token_are_greedy(option, tiny, anymamba):
    command = ("generate", "a", "--model", tiny, "--max-new-tokens", 12, "--json")
    result = anymamba(*command, "--temperature", 3, *option).json
    assert result["new_tokens"] == greedy(tiny, "a", 12)


def test_a_repetition_penalty_works_without_sampling(tiny, anymamba):
    command = ("generate", "a", "--model", tiny, "--max-new-tokens", 30, "--temperature", 0)
    free = anymamba(*command, "--json").json["new_tokens"]
    penalized = anymamba(*command, "--json", "--repetition-penalty", 1e6).json["new_tokens"]
    assert len(set(free)) < 30
    assert len(set(penalized)) == 30


def test_text_ends_before_the_first_of_the_stop_strings(anymamba):
    command = ("generate", "ROMEO:", "--seed", 1, "--max-new-tokens", 80, "--json")
    text = anymamba(*command).json["text"]
    stop = text[30:34]
    stopped = anymamba(*command, "--stop", "not in any text", "--stop", stop).json
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["ended_by"] == "stop"
    # Not one token is made after the stop string.
    assert len(stopped["new_tokens"]) == text.index(stop) + len(stop)


def test_the_end_token_ends_the_text(tiny, tmp_path, anymamba):
    tokens = greedy(tiny, "a", 8)
    last = next(token for token in tokens[1:] if token != tokens[0])
    folder = write_model(tmp_path, eos_token_id=last, pad_token_id=last)
    command = ("generate", "a", "--model", folder, "--temperature", 0, "--json")
    result = anymamba(*command).json
    assert result["new_tokens"] == tokens[: tokens.index(last) + 1]
    assert result["ended_by"] == "end"


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"to be\n", "to be"),
        (b"to be", "to be"),
        (b"to be\n\n", "to be\n"),
        (b"to be\r\n", "to be"),
        (b"to be\r", "to be\r"),
        ("être\n".encode(), "être"),
    ],
)
def test_the_prompt_comes_from_standard_input(data, prompt, tiny, typed, anymamba):
    typed(data)
    result = anymamba("generate", "--model", tiny, "--max-new-tokens", 1, "--json").json
    assert result["prompt"] == prompt
    assert result["prompt_tokens"] == list(prompt.encode())


def test_standard_input_is_left_alone_where_a_prompt_is_given(tiny, typed, anymamba):
    typed(b"other")
    result = anymamba("generate", "this\n", "--model", tiny, "--max-new-tokens", 1, "--json").json
    assert result["prompt"] == "this\n"
    assert sys.stdin.read() == "other"


def test_a_terminal_is_not_waited_for(tiny, monkeypatch, anymamba):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "no prompt" in anymamba("generate", "--model", tiny).complaint


def test_an_empty_prompt_begins_with_the_first_token_of_texts(tmp_path, tiny, anymamba):
    folder = write_model(tmp_path, bos_token_id=65)
    options = ("--max-new-tokens", 4, "--temperature", 0, "--json")
    result = anymamba("generate", "", "--model", folder, *options).json
    assert result["prompt_tokens"] == [65]
    assert result["prompt"] == ""
    assert result["new_tokens"] == greedy(tiny, "A", 4)
    assert "the prompt is empty" in anymamba("generate", "", "--model", tiny).complaint


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "warm"], "'warm'"),
        (["--top-k", "-1"], "--top-k"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--min-p", "2"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--seed", "-3"], "--seed"),
        (["--seed", "1" + "0" * 30], "--seed"),
        (["--stop", ""], "--stop"),
        (["--dtype", "int3"], "'int3'"),
        (["--dtype", "float16"], "float16"),
        (["--dtype", "float32", "--weights", "f32"], "--weights"),
        (["--weights", "int3"], "'int3'"),
        (["--threads", "0"], "--threads"),
        (["--typical-p", "0"], "--typical-p"),
        (["--presence-penalty", "inf"], "--presence-penalty"),
        (["--logit-bias", "50"], "--logit-bias"),
        (["--logit-bias", "x=1"], "'x'"),
        (["--logit-bias", "300=1"], "300"),
        (["--stop-id", "300"], "300"),
        (["--state", "./nowhere"], "./nowhere"),
        (["--save-state", "./nowhere/a.state"], "nowhere"),
        (["--save-state", "."], "folder"),
        (["--model", "./nowhere"], "./nowhere"),
        (["--model", ""], "''"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--tokenizer", "./nowhere"], "./nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, named, tiny, anymamba):
    model = [] if "--model" in options else ["--model", tiny]
    assert named.removeprefix("./") in anymamba("generate", "a", *model, *options).complaint


def test_a_prompt_that_is_no_text_is_refused(tiny, typed, anymamba):
    typed(b"\xff\xfe")
    assert "UTF-8" in anymamba("generate", "--model", tiny).complaint
    # This is how Python hands over an argument that is no UTF-8.
    assert "UTF-8" in anymamba("generate", "\udcff", "--model", tiny).complaint


def test_a_model_without_tokenizer_can_borrow_one(tiny, tmp_path, anymamba):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    command = ("generate", "a", "--model", tmp_path, "--max-new-tokens", 2)
    complaint = anymamba(*command).complaint
    assert "tokenizer.json" in complaint
    assert "--tokenizer" in complaint
    for place in (bundled_model(), bundled_model() / "tokenizer.json"):
        assert anymamba(*command, "--tokenizer", place, "--json").json["prompt_tokens"] == [97]


def test_a_broken_tokenizer_is_refused(tiny, tmp_path, anymamba):
    (tmp_path / "tokenizer.json").write_text("{}")
    command = ("generate", "a", "--model", tiny, "--tokenizer", tmp_path)
    assert str(tmp_path / "tokenizer.json") in anymamba(*command).complaint


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path, anymamba):
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.add_tokens(["anymamba"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    command = ("generate", "an anymamba", "--model", tiny, "--tokenizer", tmp_path)
    complaint = anymamba(*command).complaint
    assert "256" in complaint
    assert "tokenizer" in complaint


def test_a_broken_model_is_refused_in_one_line(tiny, tmp_path, anymamba):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert "embeddings" in anymamba("generate", "a", "--model", tmp_path).complaint


def test_tokens_can_be_forbidden_and_asked_for(tiny, anymamba):
    command = ("generate", "a", "--model", tiny, "--max-new-tokens", 8, "--json")
    first, second = greedy(tiny, "a", 2)
    assert anymamba(*command, "--temperature", 0, "--logit-bias", f"{first}=-1000").json[
        "new_tokens"
    ] != greedy(tiny, "a", 8)
    always = anymamba(*command, "--logit-bias", "65=1000", "--logit-bias", f"{first}=-9").json
    assert always["text"] == "AAAAAAAA"
    ended = anymamba(*command, "--temperature", 0, "--stop-id", second).json
    assert ended["new_tokens"] == [first, second]
    assert ended["ended_by"] == "end"


@pytest.mark.parametrize("penalty", ["--presence-penalty", "--frequency-penalty"])
def test_penalties_keep_tokens_from_coming_again(penalty, tiny, anymamba):
    command = ("generate", "a", "--model", tiny, "--max-new-tokens", 30, "--temperature", 0)
    assert len(set(anymamba(*command, penalty, 1000, "--json").json["new_tokens"])) == 30


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "int4"])
def test_weights_are_held_as_asked_for(kind, monkeypatch, anymamba):
    engines = []

    def look(arguments):
        engines.append(open_engine(arguments))
        return engines[-1]

    monkeypatch.setattr("anymamba.cli.commands.text.generate.open_engine", look)
    result = anymamba(
        "generate", "ROMEO:", "--weights", kind, "--threads", 1, "--max-new-tokens", 4, "--json"
    )
    assert result.json["ended_by"] == "length"
    assert engines[0].weight_type == kind
    assert engines[0].threads == 1


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_types_may_have_pytorch_s_names(dtype, kind, monkeypatch, anymamba):
    asked = []

    def look(arguments):
        asked.append(arguments.weights)
        return open_engine(arguments)

    monkeypatch.setattr("anymamba.cli.commands.text.generate.open_engine", look)
    assert anymamba("generate", "R", "--dtype", dtype, "--max-new-tokens", 1).status == 0
    assert asked == [kind]


def test_a_text_can_be_cut_anywhere_and_gone_on_from(tiny, tmp_path, anymamba):
    """Prompt and answer in three calls are those of one."""
    options = ("--model", tiny, "--temperature", 0, "--json")
    whole = greedy(tiny, "To be, or not", 12)
    first, second = tmp_path / "first.state", tmp_path / "second.state"
    begin = ("--max-new-tokens", 1, "--save-state", first)
    # What is written in between is part of the text, so that the bias writes what stands there.
    done = anymamba("generate", "To be", *options, *begin, "--logit-bias", f"{ord(',')}=1000")
    assert done.json["text"] == ","
    places = ("--state", first, "--save-state", second)
    done = anymamba("generate", " or not", *options, *places, "--max-new-tokens", 5)
    assert done.json["new_tokens"] == whole[:5]
    # With a state no prompt is needed.
    done = anymamba("generate", "", *options, "--state", second, "--max-new-tokens", 7)
    assert done.json["new_tokens"] == whole[5:]
    assert done.json["prompt_tokens"] == []


def test_a_terminal_is_not_waited_for_with_a_state(tiny, tmp_path, monkeypatch, anymamba):
    state = tmp_path / "a.state"
    options = ("--model", tiny, "--max-new-tokens", 1)
    assert anymamba("generate", "a", *options, "--save-state", state).status == 0
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert anymamba("generate", *options, "--state", state, "--json").json["prompt"] == ""


def test_a_state_of_another_model_is_refused(tiny, tmp_path, anymamba):
    state = tmp_path / "a.state"
    options = ("--max-new-tokens", 1)
    assert anymamba("generate", "a", *options, "--save-state", state).status == 0
    complaint = anymamba("generate", "a", "--model", tiny, *options, "--state", state).complaint
    assert "hidden_size" in complaint or "num_hidden_layers" in complaint
