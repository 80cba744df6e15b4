"""What is trained on is what the data say, or is refused: never the signs of a file's form."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from anymamba.errors import InputError
from anymamba.training.data.documents import read_texts
from anymamba.training.data.instructions import dataset_examples, read_examples

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I, \u00e9."}]
LINES = [{"messages": TALK}, {"messages": TALK}]


def lines(values: list[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(LINES)),
        ("a.json", lines(LINES)),
        ("a.json", json.dumps(LINES)),
        ("a.JSON", json.dumps(LINES, indent=2)),
        ("a.json", "\ufeff" + json.dumps(LINES)),
    ],
)
def test_conversations_in_every_spelling(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    examples = read_examples([str(file)])
    assert examples == [{"prompt": TALK[:1], "completion": TALK[1:]}] * 2


def test_one_object_and_texts(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(LINES[0], indent=1))
    assert len(read_examples([str(file)])) == 1
    file.write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert list(read_texts([str(file)])) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1}', "messages"),
        ("[1, 2]", "item 1"),
        ('{"a"', "line 1 of .* is not JSON"),
        ('[{"text": "\\ud800"}]', "surrogate"),
        ("3", "messages"),
        ("[" * 10**5, "not JSON"),
    ],
)
def test_json_that_holds_no_examples(text: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(InputError, match=word):
        read_examples([str(file)])


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("a.csv", b"a,b\n1,2\n", "table"),
        ("a.parquet", b"PAR1", "table"),
        ("a.jsonl.gz", gzip.compress(lines(LINES).encode(), mtime=0), "gunzip"),
        ("a.txt", "To be".encode("utf-16"), "UTF-16"),
        ("a.txt", "To be".encode("utf-16-le"), "UTF-16"),
        ("a.bin", bytes(range(256)), "not UTF-8"),
        ("a.txt", b"%PDF-1.7\n\0\xff", "PDF"),
        ("a.docx", b"PK\x03\x04\0\0\xff", "archive"),
        ("a.txt", b"latin \xe9", "byte 6"),
    ],
)
def test_what_is_no_text_is_refused(name: str, data: bytes, word: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    for read in (read_examples, lambda names: list(read_texts(names))):
        with pytest.raises(InputError, match=word) as caught:
            read([str(file)])
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_text_field_comes_before_all_others(name: str, tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "completion": "c", "text": "t", "story": f"once {i}"} for i in (1, 2)
    ]
    text = json.dumps(records) if name.endswith(".json") else lines(records)
    (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.jsonl").write_text(lines(records))
    expected = [{"text": "once 1"}, {"text": "once 2"}]
    assert read_examples([str(tmp_path / name)], "story") == expected
    assert read_examples([str(tmp_path / "folder")], "story") == expected
    with pytest.raises(InputError, match=r"no field 'tale'; its fields are 'prompt'"):
        read_examples([str(tmp_path / name)], "tale")


def test_a_dataset_has_a_text_field_too(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines([{"story": "once"}, {"story": "twice"}]))
    found = dataset_examples(str(tmp_path), text_field="story")
    assert found == [{"text": "once"}, {"text": "twice"}]


def test_a_folder_gives_all_that_its_files_would(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "one"}]))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "two"}]))
    (tmp_path / "c.txt").write_text("three")
    assert list(read_texts([str(tmp_path)])) == ["one", "two", "three"]
