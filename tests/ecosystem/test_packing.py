"""Packed batches, as TRL's and Transformers' padding-free collators make them."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, DataCollatorWithFlattening
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from anymamba import MambaForCausalLM
from tests.support.tolerance import assert_same

LENGTHS = [5, 1, 9, 3, 7]


@pytest.fixture
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def alone(model: MambaForCausalLM, documents: list[list[int]]) -> tuple[list[Tensor], Tensor]:
    """Each document's logits when it is all there is, and the mean loss over their tokens."""
    logits = [model(torch.tensor([document])).logits[0] for document in documents]
    losses = [
        cross_entropy(logits_lv[:-1], torch.tensor(document)[1:], reduction="none")
        for logits_lv, document in zip(logits, documents, strict=True)
    ]
    return logits, torch.cat(losses).mean()


def assert_documents_alone(
    model: MambaForCausalLM, batch: dict[str, Tensor], documents: list[list[int]]
) -> None:
    row = batch["input_ids"][0].tolist()
    assert row == [token for document in documents for token in document]
    with torch.no_grad():
        outputs = model(**batch)
        expected, loss = alone(model, documents)
    assert_same(outputs.logits[0], torch.cat(expected))
    assert float(outputs.loss) == pytest.approx(float(loss), rel=1e-5)


def test_trl_s_padding_free_collator(model: MambaForCausalLM, documents: list[list[int]]) -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": document} for document in documents])
    assert {"position_ids", "seq_idx", "cu_seq_lens_q"} <= batch.keys()
    assert_documents_alone(model, batch, documents)


@pytest.mark.parametrize("mark", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_each_mark_alone_is_enough(
    model: MambaForCausalLM, documents: list[list[int]], mark: str
) -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": document} for document in documents])
    kept = {name: batch[name] for name in ("input_ids", "labels", mark)}
    assert_documents_alone(model, kept, documents)


@pytest.mark.parametrize("return_seq_idx", [False, True])
@pytest.mark.parametrize("return_flash_attn_kwargs", [False, True])
def test_transformers_flattening_collator(
    model: MambaForCausalLM,
    documents: list[list[int]],
    return_seq_idx: bool,
    return_flash_attn_kwargs: bool,
) -> None:
    collate = DataCollatorWithFlattening(
        return_seq_idx=return_seq_idx, return_flash_attn_kwargs=return_flash_attn_kwargs
    )
    batch = collate([{"input_ids": document} for document in documents])
    assert_documents_alone(model, batch, documents)


def test_trl_s_packing(model: MambaForCausalLM, documents: list[list[int]]) -> None:
    """TRL packs documents into rows, and its collator lays the rows into one."""
    packed = pack_dataset(Dataset.from_dict({"input_ids": documents}), seq_length=12)
    rows = [{"input_ids": r["input_ids"], "seq_lengths": r["seq_lengths"]} for r in packed]
    assert len(rows) < len(documents)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate(rows)
    in_order: list[list[int]] = []
    for row in rows:
        pieces = torch.tensor(row["input_ids"]).split(list(row["seq_lengths"]))
        in_order += [piece.tolist() for piece in pieces]
    assert sorted(in_order) == sorted(documents)
    assert_documents_alone(model, batch, in_order)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_sft_trainer_s_packed_loss(
    checkpoint: Path, tmp_path: Path, model: MambaForCausalLM, texts: list[str]
) -> None:
    """The first loss that packed training logs is the mean over the documents alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    documents = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts]
    with torch.no_grad():
        _, expected = alone(model, documents)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(
            output_dir=str(tmp_path),
            packing=True,
            max_length=128,
            max_steps=1,
            per_device_train_batch_size=len(texts),
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        ),
    )
    trainer.train()
    assert trainer.padding_free
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(logged) == pytest.approx(float(expected), rel=1e-4)
