"""`pipeline("text-generation")`."""

from pathlib import Path

import transformers
from transformers import AutoTokenizer, pipeline

from anymamba import MambaForCausalLM


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
