"""Rows of batches: nothing is predicted across documents, and every order can be gone on with."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from anymamba import MambaConfig, MambaForCausalLM
from anymamba.errors import ConfigError, InputError
from anymamba.training.data.documents import (
    TokenRow,
    held_out,
    read_dataset,
    read_texts,
    texts_of,
    tokenize,
)
from anymamba.training.data.packing import Rows, collate, windows_side_by_side
from anymamba.training.data.tokenizers import END_OF_TEXT, open_tokenizer
from anymamba.training.pretrain.validation import loss_of_stream, loss_of_windows
from tests.support.training import small


def row_of(*lengths: int) -> TokenRow:
    """Documents of those lengths; each token is a number of its own."""
    starts = np.cumsum([0, *lengths])[:-1]
    return TokenRow(np.arange(sum(lengths), dtype=np.uint32), starts)


def rows(row: TokenRow, order: str, window: int = 4, streams: int = 2) -> Rows:
    return Rows(row, window, order, streams, 10**6, 3)


def test_targets_are_the_next_tokens_of_the_same_document() -> None:
    documents = rows(row_of(3, 5, 2, 9), "shuffled")
    ends = {2, 7, 9, 18}
    for number in range(40):
        item = documents[number]
        pairs = zip(item["input_ids"].tolist(), item["shift_labels"].tolist(), strict=True)
        for token, target in pairs:
            assert target == (-100 if token in ends else token + 1)
        document = np.searchsorted([3, 8, 10], item["input_ids"].numpy(), side="right")
        assert (item["seq_idx"].numpy() == document - document[0]).all()


def test_shuffled_rows_are_every_window_once_each_time() -> None:
    documents = rows(row_of(41), "shuffled")
    for epoch in range(3):
        seen = [documents[epoch * 9 + number]["input_ids"] for number in range(9)]
        assert len(torch.cat(seen).unique()) == 36
    assert [documents[n]["input_ids"][0].item() for n in range(9)] != list(range(0, 36, 4))


def test_random_rows_reach_the_last_token_and_depend_on_their_number_alone() -> None:
    documents = rows(row_of(9), "random")
    seen = {documents[number]["input_ids"][0].item() for number in range(200)}
    assert seen == set(range(5))
    assert torch.equal(documents[77]["input_ids"], rows(row_of(9), "random")[77]["input_ids"])


def test_carried_rows_follow_one_another_in_their_stream() -> None:
    documents = rows(row_of(41), "carried")
    firsts = [documents[number]["input_ids"][0].item() for number in range(12)]
    assert firsts == [0, 20, 4, 24, 8, 28, 12, 32, 16, 36, 0, 20]
    assert [bool(documents[number]["begins"]) for number in (0, 1, 2, 9, 10)] == [
        True, True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["random", "shuffled", "carried"])
def test_too_little_text_is_refused(order: str) -> None:
    with pytest.raises(InputError, match="tokens to train on"):
        rows(row_of(4), order)


def test_packed_windows_have_the_losses_of_documents_alone() -> None:
    """Against the model's own loss on one document at a time."""
    torch.manual_seed(0)
    lengths = (5, 9, 2, 7)
    row = row_of(*lengths)
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2))
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start, length in zip(row.starts.tolist(), lengths, strict=True):
            ids = torch.arange(start, start + length)[None]
            total += float(model(ids, labels=ids).loss) * (length - 1)
    whole = loss_of_windows(model, row, window=sum(lengths) - 1)
    stream = loss_of_stream(model, row, chunk=4)
    assert whole.count == stream.count == sum(lengths) - len(lengths)
    # float32, in another order of sums.
    assert whole.total == pytest.approx(total, rel=1e-5)
    assert stream.total == pytest.approx(total, rel=1e-5)


def test_windows_lie_side_by_side() -> None:
    row = row_of(21)
    assert windows_side_by_side(row, 4) == [0, 4, 8, 12, 16]
    assert windows_side_by_side(row, 4, most=2) == [0, 8]
    batch = collate([rows(row, "random")[0]])
    assert "seq_idx" not in batch  # one document, so nothing needs to be unpacked


def test_texts_come_from_files_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"zwei\r\n")
    (tmp_path / "a.jsonl").write_text('{"text": "eins"}\n\n{"text": "und"}\n')
    (tmp_path / "c.png").write_bytes(b"\xff")
    assert list(read_texts([str(tmp_path)])) == ["eins", "und", "zwei\r\n"]
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"body": "a"}))
    with pytest.raises(InputError, match=r"line 1 of '.*wrong.jsonl' has no text in 'text'"):
        list(read_texts([str(tmp_path / "wrong.jsonl")]))
    (tmp_path / "wrong.txt").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="is not UTF-8 text: see its byte 2"):
        list(read_texts([str(tmp_path / "wrong.txt")]))
    with pytest.raises(InputError, match="cannot read"):
        list(read_texts([str(tmp_path / "none.txt")]))


def test_a_mark_of_utf_8_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    assert list(read_texts([str(tmp_path)])) == ["one", "two"]


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\uD83D"}\n')
    with pytest.raises(InputError, match=r"line 2 of .* holds half of a surrogate pair"):
        list(read_texts([str(file)]))


def test_an_empty_text_to_validate_on_is_refused(tmp_path: Path) -> None:
    settings = small(tmp_path, validation_data=[str(tmp_path / "empty.txt")])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"nothing to validate on: .*empty.txt"):
        texts_of(settings)


def test_texts_come_from_a_dataset(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"body": ["eins", "", "zwei"]})
    made.save_to_disk(tmp_path / "made")
    assert list(read_dataset(str(tmp_path / "made"), None, "train", "body")) == ["eins", "zwei"]
    with pytest.raises(InputError, match="has no field 'text', it has body"):
        list(read_dataset(str(tmp_path / "made"), None, "train", "text"))


def test_datasets_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["a"], "number": [3]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    assert list(read_dataset(str(tmp_path / "dict"), None, "train", "text")) == ["a"]
    with pytest.raises(InputError, match=r"row 0 of .*dict' has no text in 'number', but int"):
        list(read_dataset(str(tmp_path / "dict"), None, "train", "number"))
    with pytest.raises(InputError, match=r"there is no dataset .*split 'test'"):
        list(read_dataset(str(tmp_path / "dict"), None, "test", "text"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"text": ')
    with pytest.raises(InputError, match=r"there is no dataset .*broken"):
        list(read_dataset(str(tmp_path / "broken"), None, "train", "text"))
    assert not caplog.records


def test_the_split_is_the_convention() -> None:
    text = "x" * 1_115_394  # as long as tinyshakespeare
    train, validation = held_out([text], 0.1)
    assert (len(train[0]), len(validation[0])) == (1_003_854, 111_540)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_tokenizers_spell_every_text(name: str, tmp_path: Path) -> None:
    texts = ["To be, or not to be", "that  is\nthe question. 日本 \x00"]
    tokenizer = open_tokenizer(name, texts, 300)
    row = tokenize(texts, tokenizer)
    assert tokenizer.decode(row.tokens[row.starts[1] :]).removesuffix(END_OF_TEXT) == texts[1]
    if name == "byte":
        assert row.tokens.tolist() == list("".join(texts).encode())
    else:
        assert row.tokens[row.starts[1] - 1] == tokenizer.eos_token_id
        assert len(tokenizer) <= 300
    tokenizer.save_pretrained(tmp_path)
    reused = open_tokenizer(str(tmp_path), [], 0)
    assert tokenize(texts, reused).tokens.tolist() == row.tokens.tolist()


def test_a_tokenizer_without_words_is_none(tmp_path: Path) -> None:
    """Transformers makes one up for the folder of a model that comes without any."""
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match=r"there is no tokenizer .*: it has no tokenizer.json"):
        open_tokenizer(str(tmp_path), [], 300)
