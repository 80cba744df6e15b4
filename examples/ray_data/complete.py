"""Complete all prompts of a file, on all machines of a Ray cluster.

    python complete.py prompts.jsonl answers --model state-spaces/mamba-130m-hf --actors 4

Each line of the file is a JSON object with a "prompt"; the folder gets files of the same lines with
a "completion". Every actor has one engine, and writes the texts of a batch at the same time.
"""

import argparse
from pathlib import Path
from typing import Any

import ray


class Completer:
    """One engine, which stays loaded from batch to batch."""

    def __init__(self, model: str | None, max_new_tokens: int) -> None:
        import anymamba

        self.engine = anymamba.load(model)
        self.max_new_tokens = max_new_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = [str(prompt) for prompt in batch["prompt"]]
        found = self.engine.generate_batch(prompts, max_new_tokens=self.max_new_tokens)
        return {**batch, "completion": [answer.text for answer in found]}


def place(given: str) -> str:
    """A path as other processes find it; an address such as s3://... stays."""
    return given if "://" in given else str(Path(given).resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=place, help="a file of JSON lines, or a folder of them")
    parser.add_argument("answers", type=place, help="the folder to write")
    parser.add_argument("--model", help="a hub name or a whole path (default: the bundled model)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--actors", type=int, default=1, help="engines at the same time")
    parser.add_argument("--batch", type=int, default=16, help="texts that an engine writes at once")
    options = parser.parse_args()
    rows = ray.data.read_json(options.prompts, lines=True)
    completed = rows.map_batches(
        Completer,
        fn_constructor_args=(options.model, options.max_new_tokens),
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
    )
    completed.write_json(options.answers)


if __name__ == "__main__":
    main()
