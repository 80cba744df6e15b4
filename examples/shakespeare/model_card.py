"""The model card: what was trained on what, how, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [mamba, byte-level]
---

# A small byte-level Mamba

A Mamba language model with {parameters:,} parameters that reads and writes bytes. It was trained
from random weights on one text, `{data}`, and knows nothing else: it imitates that text, and is
there to try the software, to test it and to learn from.

Validation loss, in nats per byte, on the last 10 % of the text ({validation_bytes:,} bytes,
never trained on):

| how the text is read | nats per byte |
| --- | --- |
| in windows of {window} bytes, each from an empty state | {windows:.4f} |
| as one stream, the state carried from beginning to end | {stream:.4f} |

Training:

| | |
| --- | --- |
| text | the first 90 %, {epochs:.1f} times over ({read:,} bytes, in windows from random places) |
| time | {minutes:.1f} minutes, {cpu_minutes:.0f} minutes of processor time |
| machine | an ordinary CPU without a GPU, {threads} |
| seed | {seed} |

The weights are stored in bfloat16. The losses are those of the stored weights, computed in
float32. Of the states that training passed through, the one with the lowest loss on every fourth
validation window was kept (step {best_step} of {steps}).

## Recipe

{layers} layers, width {hidden_size}, state size {state_size}, tied embeddings. AdamW (betas 0.9
and 0.95) on batches of {batch} windows of {window} bytes; learning rate {learning_rate:g}, after a
linear warm-up over {warm_up:.0%} of the budget a cosine down to {final_learning_rate:g}; weight
decay {weight_decay:g} on matrices only; gradients clipped to a norm of {gradient_clip:g}. The
script is `examples/shakespeare/train.py` of AnyMamba, and `training.json` has each number and the
curve of losses.

## Tokenizer

A token's number is the value of its byte: 256 tokens, none of them special. There is no token for
the end of a text, so generation stops at a length or at a stop string.

## Sample

Temperature 0.8, after the prompt `ROMEO:` and a new line:

```text
{sample}
```
"""


def write_model_card(folder: Path, details: dict[str, Any]) -> None:
    """Write `README.md` from the content of `training.json`."""
    recipe, record, result = details["recipe"], details["record"], details["result"]
    text = TEMPLATE.format(
        **recipe,
        data=details["data"],
        threads=f"{details['threads']} thread{'s' if details['threads'] > 1 else ''}",
        parameters=result["parameters"],
        validation_bytes=result["validation_bytes"],
        windows=result["validation_loss_windows"],
        stream=result["validation_loss_stream"],
        sample=result["sample"].strip(),
        steps=record["steps"],
        best_step=record["best_step"],
        read=record["train_bytes_read"],
        epochs=record["train_bytes_read"] / (9 * result["validation_bytes"]),
        minutes=record["seconds"] / 60,
        cpu_minutes=record["cpu_seconds"] / 60,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
