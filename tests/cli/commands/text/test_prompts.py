"""`anymamba generate --prompts`: each line's answer is the one that its prompt gets by itself."""

import json
from pathlib import Path

import pytest

from tests.support.cli import Command

PROMPTS = ["To be", "a", "or not to be, that is", "Exit, pursued by a bear.", "ROMEO:"]
FEW = ("--max-new-tokens", 6)


def write_lines(folder: Path, *records: object) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_answers_do_not_depend_on_the_batch(
    batch: int, temperature: float, tiny: Path, tmp_path: Path, anymamba: Command
) -> None:
    options = (*FEW, "--model", tiny, "--temperature", temperature)
    records = [{"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)]
    file = write_lines(tmp_path, *records)
    done = anymamba("generate", "--prompts", file, "--batch", batch, "--seed", 5, *options)
    assert done.status == 0, done.err
    for number, answer in enumerate(lines(done.out)):
        alone = anymamba("generate", PROMPTS[number], "--seed", 5 + number, *options, "--json").json
        assert answer == records[number] | {
            "text": alone["text"],
            "new_tokens": alone["new_tokens"],
            "ended_by": alone["ended_by"],
        }
    assert len(lines(done.out)) == len(PROMPTS)
    assert "5 prompts; new: 30 tokens" in done.err


def test_a_line_may_be_a_text_and_a_state_comes_before_each(
    tiny: Path, tmp_path: Path, anymamba: Command
) -> None:
    state, model = tmp_path / "a.state", ("--model", tiny, "--temperature", 0)
    (tmp_path / "text.txt").write_text("Once upon a time")
    assert anymamba("ingest", tmp_path / "text.txt", "--save-state", state, *model[:2]).status == 0
    file = write_lines(tmp_path, "there", "was")
    options = ("--state", state, *FEW, *model)
    answers = lines(anymamba("generate", "--prompts", file, *options).out)
    for answer, prompt in zip(answers, ("there", "was"), strict=True):
        assert answer["prompt"] == prompt
        assert answer["text"] == anymamba("generate", prompt, *options, "--json").json["text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of"),
        ("[1]", "neither a text nor an object"),
        ('{"text": "a"}', 'with a "prompt"'),
        ('{"prompt": "a", "text": "b"}', "has a field 'text'"),
        ('{"prompt": ""}', 'with a "prompt"'),
        ('{"prompt": 1}', 'with a "prompt"'),
        ('"\\ud800"', "half of a surrogate pair"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "a", "id": NaN}', "not JSON"),
    ],
)
def test_a_wrong_line_is_refused_before_anything_is_written(
    line: str, message: str, tiny: Path, tmp_path: Path, anymamba: Command
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"a"\n{line}\n')
    assert message in anymamba("generate", "--prompts", file, *FEW, "--model", tiny).complaint


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--echo",), "--echo and --prompts"),
        (("--json",), "--json and --prompts"),
        (("a prompt",), "PROMPT and --prompts"),
        (("--save-state", "x.state"), "--save-state and --prompts"),
        (("--device", "cuda"), "--device cpu"),
        (("--batch", "0"), "--batch"),
    ],
)
def test_what_speaks_of_one_prompt_is_refused(
    options: tuple[str, ...], named: str, tiny: Path, tmp_path: Path, anymamba: Command
) -> None:
    file = write_lines(tmp_path, "a")
    words = ("generate", *options, "--prompts", file, *FEW, "--model", tiny)
    assert named in anymamba(*words).complaint


def test_batch_without_prompts_is_refused(anymamba: Command) -> None:
    assert "--prompts" in anymamba("generate", "a", "--batch", 2).complaint
