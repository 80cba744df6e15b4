"""`anymamba finetune`, then `merge` and `generate --adapter`: from examples to answers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support import processes
from tests.support.files import with_head

pytestmark = pytest.mark.slow

pytest.importorskip("trl")

PAIRS = {"ab=": "xyz", "cd=": "uvw"}
OPTIONS = ("--batch-size", 2, "--max-length", 64, "--json")


@pytest.fixture(scope="module")
def sharp(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a louder head: as it is, no hidden state makes a token almost certain."""
    return with_head(tiny, tmp_path_factory.mktemp("sharp") / "model", lambda head: 8 * head)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in PAIRS.items()]
    file.write_text("\n".join(lines))
    return file


def answer(anymamba, prompt: str, *options: object) -> dict[str, object]:
    """What comes of a prompt, greedily."""
    return anymamba(
        "generate", prompt, *options, "--temperature", 0, "--max-new-tokens", 8, "--json"
    ).json


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_learns_to_answer(method, sharp, pairs, tmp_path, anymamba):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    options = ("--model", sharp, "--method", method, "--rank", 8, "--learning-rate", 0.03)
    done = anymamba(
        "finetune", pairs, "--output", adapter, *options, "--max-steps", 60, *OPTIONS,
        "--validation", pairs,
    )  # fmt: skip
    facts = done.json
    assert facts["steps"] == 60
    assert facts["stopped_by"] == "end"
    assert facts["trained_parameters"] < facts["parameters"]
    assert facts["validation_after"] < 0.1 < 1 < facts["validation_before"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        file.name for file in adapter.iterdir()
    }
    assert anymamba("merge", adapter, merged, "--json").json["destination"] == str(merged)
    for prompt, completion in PAIRS.items():
        for model in (("--adapter", adapter), ("--model", merged)):
            said = answer(anymamba, prompt, *model)
            # The end of the answer was learned too.
            assert (said["text"], said["ended_by"]) == (completion, "end")
        assert answer(anymamba, prompt, "--model", sharp)["text"] != completion


def test_all_weights_are_trained_where_asked(sharp, pairs, tmp_path, anymamba):
    model = tmp_path / "model"
    options = ("--model", sharp, "--method", "full", "--learning-rate", 0.01, "--max-steps", 60)
    facts = anymamba("finetune", pairs, "--output", model, *options, *OPTIONS).json
    assert facts["trained_parameters"] == facts["parameters"]
    before, after = (load_file(place / "model.safetensors") for place in (sharp, model))
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    for prompt, completion in PAIRS.items():
        assert answer(anymamba, prompt, "--model", model)["text"] == completion


def test_a_conversation_is_continued_by_its_template(sharp, tmp_path, anymamba):
    talk, adapter = tmp_path / "talk.jsonl", tmp_path / "adapter"
    said = ["hi", "xyz", "so", "uvw"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    talk.write_text(json.dumps({"messages": messages}))
    options = ("--model", sharp, "--rank", 8, "--learning-rate", 0.03, "--max-steps", 60)
    facts = anymamba("finetune", talk, "--output", adapter, *options, *OPTIONS).json
    assert facts["examples"] == 2  # one an answer
    script = [sys.executable, "-m", "anymamba", "chat", "--adapter", str(adapter), "--json"]
    done = processes.run(*script, "--temperature", "0", "--max-new-tokens", "20", input="hi\nso\n")
    assert done.returncode == 0, done.stderr
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [reply["text"].strip() for reply in replies] == ["xyz", "uvw"]
    assert all(reply["ended_by"] == "end" for reply in replies)


def test_scores_are_those_with_the_adapter(sharp, pairs, tmp_path, anymamba):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    options = ("--model", sharp, "--learning-rate", 0.03, "--max-steps", 5)
    assert anymamba("finetune", pairs, "--output", adapter, *options, *OPTIONS).status == 0
    assert anymamba("merge", adapter, merged).out.startswith(f"{merged}: merged, ")
    text = tmp_path / "text.txt"
    text.write_text("ab=xyz")
    found, same, before = (
        anymamba("score", text, "--json", *model).json["nats"]
        for model in (("--adapter", adapter), ("--model", merged), ("--model", sharp))
    )
    assert found == pytest.approx(same, rel=1e-6)  # one sum, in one float32 rounding
    assert found != pytest.approx(before, rel=1e-3)


MISTAKES = {
    "no example": ("", "no examples"),
    "no JSON": ("{", "line 1"),
    "no known field": ('{"question": "a"}', "messages"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
    "no content": ('{"messages": [{"role": "user"}]}', "content"),
    "two kinds": ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "several kinds"),
    "no text": ('{"prompt": "a", "completion": 3}', "not empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_data_are_told_in_a_line(mistake, tiny, tmp_path, anymamba):
    content, word = MISTAKES[mistake]
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    done = anymamba("finetune", file, "--output", tmp_path / "new", "--model", tiny)
    assert word in done.complaint
    assert not (tmp_path / "new").exists()


def test_other_mistakes_are_told_in_a_line(tiny, pairs, tmp_path, anymamba):
    new = ("--output", tmp_path / "new", "--model", tiny)
    assert "targets" in anymamba("finetune", pairs, *new, "--targets", "conv1d").complaint
    assert "rank" in anymamba("finetune", pairs, *new, "--rank", 0).complaint
    taken = ("--output", tiny, "--model", tiny)
    assert "replace the source" in anymamba("finetune", pairs, *taken).complaint
    assert "exists" in anymamba("finetune", pairs, "--output", tmp_path, "--model", tiny).complaint
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no such role') }}")
    talk = tmp_path / "talk.jsonl"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk.write_text(json.dumps({"messages": messages}))
    done = anymamba("finetune", talk, *new, "--chat-template", template)
    assert "no such role" in done.complaint
    assert "no adapter" in anymamba("merge", tmp_path / "nothing", tmp_path / "new").complaint
    done = anymamba("generate", "a", "--adapter", tmp_path / "nothing")
    assert "no adapter" in done.complaint


def test_a_loss_that_is_no_number_leaves_nothing(tiny, pairs, tmp_path, anymamba):
    options = ("--model", tiny, "--method", "full", "--learning-rate", 2e9, "--max-steps", 20)
    done = anymamba("finetune", pairs, "--output", tmp_path / "new", *options, *OPTIONS)
    assert "the loss became" in done.complaint
    assert not (tmp_path / "new").exists()
