"""Write the model card of a folder that `anymamba train` left, from what was measured.

python examples/shakespeare/model_card.py my-model --data tinyshakespeare.txt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from check import Part, losses
from transformers import AutoTokenizer

from anymamba import MambaForCausalLM

PROMPTS = ("ROMEO:\n", "First Citizen:\n", "KING RICHARD II:\n")
TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags: [mamba, byte-level]
---

# A small byte-level Mamba

A Mamba language model with {parameters:,} parameters that reads and writes bytes. It was trained
from random weights on one text, `tinyshakespeare.txt` (1.1 MB of Shakespeare's plays), and knows
nothing else: it imitates that text, and is there to try the software, to test it and to learn from.

## Losses

In nats per byte, of the weights as they are stored (bfloat16), computed in float32. The first 90 %
of the text trained the model, the last 10 % ({validation_tokens:,} bytes) are held out.

| part | how it is read | nats per byte |
| --- | --- | --- |
| held out | in windows of 256 bytes, each from an empty state | {windows:.4f} |
| held out | the same, by Transformers' own `MambaForCausalLM` | {theirs:.4f} |
| held out | as one stream, the state carried from beginning to end | {stream:.4f} |
| trained on | in {train_windows:,} of its windows, by Transformers' own class | {train:.4f} |

No byte of the last 10 % was trained on. They were looked at, though: every hundred steps, to keep
the best of the states that training passed through (step {best_step:,} of {steps:,}), and when
dropout, batch and steps were chosen, from seven trainings, most of them stopped early. So the
figures flatter a little.
`examples/shakespeare/check.py` measures the second and the last line again.

## Training

| | |
| --- | --- |
| text | {epochs:.1f} times the first 90 % ({tokens:,} bytes, in windows from random places) |
| time | {minutes:.0f} minutes |
| machine | {machine}, {threads} |
| seed | {seed} |

![Losses during training](loss.png)

{layers} layers of width {hidden_size}, state size {state_size}, tied embeddings. AdamW (betas
{beta1:g} and {beta2:g}) on batches of {batch} windows of {window} bytes, in {dtype}; learning rate
{learning_rate:g} after a linear warm-up over {warm_up:.0%} of the steps, then a cosine down to
{final_learning_rate:g}; weight decay {weight_decay:g} on matrices only; gradients clipped to a norm
of {gradient_clip:g}; dropout {dropout:g} on what each layer adds,
{embedding_dropout:g} on embeddings. `training.json` has each setting
and the curve of losses. One command trains it anew:

```text
anymamba train --config examples/shakespeare/recipe.yaml --data tinyshakespeare.txt
```

## Tokenizer

A token's number is the value of its byte: 256 tokens, none of them special. There is no token for
the end of a text, so generation stops at a length or at a stop string.

## Samples

Temperature 0.8, seed 1, after a speaker's name and a new line:

{samples}
"""


def main() -> None:
    """Measure, generate, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="the trainer's output folder")
    parser.add_argument("--data", type=Path, required=True, help="the text")
    parser.add_argument(
        "--machine", default="an ordinary CPU without a GPU", help="what it was trained on"
    )
    parser.add_argument(
        "--every", type=int, default=16, help="read each so-manieth training window (default 16)"
    )
    arguments = parser.parse_args()
    folder = arguments.model
    details = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    parts = losses(folder, arguments.data, arguments.every)
    text = card(details, parts, arguments.machine, samples(folder))
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(
    details: dict[str, Any], parts: tuple[Part, Part], machine: str, samples: list[str]
) -> str:
    """The card's text.

    Args:
        details: the content of `training.json`.
        parts: the losses on the training and the validation part, by Transformers' class.
        machine: what trained the model.
        samples: what the model wrote.
    """
    settings, result = details["settings"], details["result"]
    training, validation = parts
    nats = {
        "windows": result["validation_loss_windows"],
        "theirs": validation.loss,
        "stream": result["validation_loss_stream"],
        "train": training.loss,
    }
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    measured = {
        "train_windows": training.windows,
        "threads": threads,
        "epochs": result["tokens"] / training.size,
        "minutes": result["seconds"] / 60,
        "machine": machine,
        "samples": "\n\n".join(f"```text\n{sample}\n```" for sample in samples),
    }
    return TEMPLATE.format(**({"best_step": result["steps"]} | settings | result | nats | measured))


def samples(folder: Path) -> list[str]:
    """How the model goes on from each of `PROMPTS`, for 400 bytes and to the end of that line."""
    model = MambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        torch.manual_seed(1)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(
            ids, max_new_tokens=400, do_sample=True, temperature=0.8, top_k=0, pad_token_id=0
        )
        texts.append(tokenizer.decode(tokens[0]).rpartition("\n")[0].strip())
    return texts


if __name__ == "__main__":
    main()
