"""Auto classes, `generate` and `pipeline`, as a model card's snippets use them."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

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


def test_the_pipeline_writes_with_ours_what_transformers_writes(
    checkpoint: Path, registered: None, transformers_model: transformers.MambaForCausalLM
) -> None:
    write = pipeline("text-generation", model=str(checkpoint), device="cpu")
    assert type(write.model) is MambaForCausalLM
    prompts = ["To be, ", "Brevity"]
    texts = [
        written["generated_text"]
        for (written,) in write(prompts, max_new_tokens=12, do_sample=False)
    ]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        theirs = transformers_model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(theirs[0], skip_special_tokens=True)
        assert text.startswith(prompt)


def test_the_pipeline_takes_a_batch(checkpoint: Path, registered: None) -> None:
    """Prompts of different lengths are padded; each text is the one it would be alone."""
    write = pipeline("text-generation", model=str(checkpoint), device="cpu")
    write.tokenizer.padding_side = "left"
    prompts = ["To be, ", "Brevity is the soul", "x"]
    alone = [write(prompt, max_new_tokens=8, do_sample=False) for prompt in prompts]
    together = write(prompts, batch_size=3, max_new_tokens=8, do_sample=False)
    assert together == alone
