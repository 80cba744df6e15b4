"""AutoModelForCausalLM, AutoTokenizer and `generate`, as a model card's snippet uses them."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from anymamba import MambaForCausalLM


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_writes_what_transformers_writes(
    checkpoint: Path,
    registered: None,
    transformers_model: transformers.MambaForCausalLM,
    beams: int,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is MambaForCausalLM
    inputs = tokenizer("All the world's a stage", return_tensors="pt")
    options = {"max_new_tokens": 15, "num_beams": beams, "do_sample": False}
    ours = model.generate(**inputs, **options)
    theirs = transformers_model.generate(**inputs, **options)
    assert ours.tolist() == theirs.tolist()
    assert tokenizer.decode(ours[0]).startswith("All the world's a stage")


def test_a_type_is_taken_as_transformers_takes_it(checkpoint: Path, registered: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert type(model) is MambaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape[1] > 3
