"""`anymamba evaluate`: the harness's results, and that the runtime's commands agree with them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anymamba.assets import bundled_model
from anymamba.runtime.convert.conversion import convert
from anymamba.runtime.convert.quantizing import quantize_checkpoint
from tests.support.cli import Command
from tests.support.files import BYTES, write_model

pytestmark = pytest.mark.slow

tasks = pytest.importorskip("lm_eval.tasks")

TEXTS = (
    "KING RICHARD III:\nI am the king",
    "To be, or not to be: that is the question",
    "ROMEO:\nO, wherefore art thou not to the",
    "What say you to the duke of the",
    "Good night, good night! parting is such sweet",
    "What say you to my suit, my gracious lord",  # the one that the bundled model completes
)
# The same float32 weights and logits in two implementations: their log-probabilities differ by
# some 1e-5, and lm-eval rounds nothing.
CLOSE = 1e-4


def write_task(folder: Path, name: str, lines: str, texts: tuple[str, ...] = TEXTS) -> Path:
    """A task of the harness over a file of its own."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = folder / f"{name}.yaml"
    file.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"test_split: test\n{lines}metadata:\n  version: 1.0\n"
    )
    return file


# As the harness's own lambada_openai.
LAST_WORDS = """\
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
# As its wikitext.
WHOLE_TEXTS = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
WRITING = """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(autouse=True)
def _few_tasks_and_caches_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the harness's own tasks, which it looks through for a name, those of one folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = Path(tasks.__file__).parent / "lambada"
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))


@pytest.mark.parametrize("bundled", [True, False])
def test_lambada_agrees(bundled: bool, tmp_path: Path, anymamba: Command) -> None:
    model = bundled_model() if bundled else write_model(tmp_path)
    task = write_task(tmp_path, "last_words", LAST_WORDS)
    options = ("--model", model, "--json")
    theirs = anymamba("evaluate", task, "--offline", *options).json["tasks"]["last_words"]
    ours = anymamba("lambada", tmp_path / "last_words.jsonl", *options).json
    assert theirs["questions"] == ours["passages"] == len(TEXTS)
    assert theirs["acc"] == ours["accuracy"]
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=CLOSE)
    assert not bundled or 0 < ours["accuracy"] < 1


def test_score_agrees(tmp_path: Path, anymamba: Command) -> None:
    """The harness puts a token before a text; here it is a new line, and `score` is given it."""
    text = TEXTS[1]
    task = write_task(tmp_path, "whole", WHOLE_TEXTS, (text,))
    theirs = anymamba("evaluate", task, "--offline", "--json").json["tasks"]["whole"]
    (tmp_path / "a.txt").write_text("\n" + text)
    ours = anymamba("score", tmp_path / "a.txt", "--json").json
    assert ours["tokens"] == len(text)
    assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=CLOSE)
    words = len(text.split())
    assert theirs["word_perplexity"] == pytest.approx(math.exp(ours["nats"] / words), rel=CLOSE)


def test_an_adapter_counts(tmp_path: Path, anymamba: Command) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
    write_model(model)
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(model)}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    name = "base_model.model.backbone.embeddings.lora_embedding_"
    sides = {f"{name}A": np.ones((1, BYTES["vocab_size"]), np.float32)}
    sides[f"{name}B"] = np.linspace(-1, 1, BYTES["hidden_size"], dtype=np.float32)[:, None]
    save_file(sides, adapter / "adapter_model.safetensors")
    task = write_task(tmp_path, "whole", WHOLE_TEXTS, TEXTS[1:2])
    (tmp_path / "a.txt").write_text("\n" + TEXTS[1])
    found = []
    for options in (("--adapter", adapter), ("--model", model)):
        theirs = anymamba("evaluate", task, "--offline", "--json", *options).json["tasks"]["whole"]
        ours = anymamba("score", tmp_path / "a.txt", "--json", *options).json
        assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=CLOSE)
        found.append(theirs["bits_per_byte"])
    assert found[0] != pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("form", ["int8", "gguf"])
def test_models_in_other_forms(form: str, tmp_path: Path, anymamba: Command) -> None:
    task = write_task(tmp_path, "whole", WHOLE_TEXTS, TEXTS[1:2])
    (tmp_path / "a.txt").write_text("\n" + TEXTS[1])
    if form == "int8":
        model = quantize_checkpoint(bundled_model(), tmp_path / "model", "int8")
    else:
        pytest.importorskip("gguf")
        model = convert(bundled_model(), tmp_path / "model.gguf", "gguf")
    theirs = anymamba("evaluate", task, "--offline", "--json", "--model", model)
    ours = anymamba("score", tmp_path / "a.txt", "--json", "--model", model).json
    # A last bit may carry an activation over a border of its rounding to 8 bits.
    close = 1e-2 if form == "int8" else CLOSE
    found = theirs.json["tasks"]["whole"]["bits_per_byte"]
    assert found == pytest.approx(ours["bits_per_byte"], rel=close)


def test_several_at_once_are_as_one_by_one(tmp_path: Path, anymamba: Command) -> None:
    """Questions of different lengths share a batch, padded."""
    task = write_task(tmp_path, "last_words", LAST_WORDS)
    found = [
        anymamba("evaluate", task, "--offline", "--batch-size", size, "--json").json["tasks"]
        for size in (1, 4)
    ]
    one, four = (tasks["last_words"]["perplexity"] for tasks in found)
    assert one == pytest.approx(four, rel=CLOSE)


def test_a_task_that_has_the_model_write(tmp_path: Path, anymamba: Command) -> None:
    """Of bytes without any mark of an end, which the harness needs one of."""
    task = write_task(tmp_path, "writing", WRITING)
    options = ("--limit", 2, "--offline", "--json")
    found = anymamba("evaluate", task, *options).json["tasks"]["writing"]
    assert found["exact_match"] == 0
    assert found["questions"] == 2


def test_a_table_for_people(tmp_path: Path, anymamba: Command) -> None:
    write_task(tmp_path, "last_words", LAST_WORDS)
    task = write_task(tmp_path, "other", LAST_WORDS)
    done = anymamba("evaluate", "last_words", task, "--include", tmp_path, "--offline")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert {"last_words", "other"} <= set(lines)
    assert any(line.split() == ["questions", str(len(TEXTS))] for line in lines)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("nowhere.yaml",), "nowhere.yaml"),
        (("no_such_task",), "no_such_task"),
        (("a.yaml", "--include", "nowhere"), "no folder"),
        (("nameless.yaml",), "no name"),
        (("last_words.yaml", "--device", "abacus"), "abacus"),
        (("last_words.yaml", "--adapter", "nowhere"), "no adapter"),
        (("last_words.yaml", "--tokenizer", "nowhere"), "no tokenizer"),
        (("broken/no_split.yaml",), "cannot load 'no_split': KeyError"),
        (("broken/no_field.yaml",), "cannot load 'no_field': UndefinedError"),
        (("broken/no_setting.yaml",), "cannot load 'no_setting': TypeError"),
        (("broken/no_text.yaml",), "not UTF-8"),
    ],
)
def test_mistakes(
    words: tuple[str, ...],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    anymamba: Command,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, "last_words", LAST_WORDS)
    Path("nameless.yaml").write_text("dataset_path: json\n", encoding="utf-8")
    Path("broken").mkdir()
    for name, old, new in (
        ("no_split", "test_split: test", "test_split: nope"),
        ("no_field", "{{text", "{{words"),
        ("no_setting", "test_split", "nope: 1\ntest_split"),
    ):
        task = write_task(Path("broken"), name, LAST_WORDS)
        task.write_text(task.read_text().replace(old, new))
    Path("broken/no_text.yaml").write_bytes(b"\xff")
    assert reason in anymamba("evaluate", *words, "--offline").complaint


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        (LAST_WORDS, ("--max-length", 2), "with max_length=2 an answer may be longer"),
        (LAST_WORDS.replace("perplexity", "wit").replace("acc", "charm"), (), "gives no figures"),
    ],
)
def test_mistakes_that_show_late(
    lines: str, options: tuple[object, ...], reason: str, tmp_path: Path, anymamba: Command
) -> None:
    """After the harness has begun to tell how far it is."""
    task = write_task(tmp_path, "last_words", lines)
    done = anymamba("evaluate", task, "--offline", *options)
    assert (done.status, done.out) == (2, "")
    assert reason in done.err
    assert "Traceback" not in done.err


def test_git_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anymamba: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    task = write_task(tmp_path, "last_words", LAST_WORDS)
    assert "git" not in anymamba("evaluate", task, "--offline").err


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, anymamba: Command) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "anymamba[eval]" in anymamba("evaluate", "lambada_openai").complaint


def test_the_environment_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anymamba: Command
) -> None:
    import os

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "anymamba.training.evaluate.evaluate", lambda *_, **__: seen.update(os.environ) or {}
    )
    assert anymamba("evaluate", "a.yaml", "--offline", "--json").json["tasks"] == {}
    assert seen["HF_HUB_OFFLINE"] == seen["HF_DATASETS_OFFLINE"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "HF_DATASETS_OFFLINE" not in os.environ
