"""Checkpoints on the hub whose architecture AnyMamba has, with facts from their public cards."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anymamba.checkpoint import expected_shapes


@dataclass(frozen=True)
class KnownModel:
    """A checkpoint on the Hugging Face hub.

    Args:
        name: its id there.
        use: "base" for one that continues texts, "chat" for one tuned on conversations.
        licence: as its card or, of a copy in another layout, the original's card names it.
        width: d.
        layers: how many.
        tied: whether the head is the embedding table.
        vocabulary: v, with padding.
        pickled: whether its weights are a pickle, which `anymamba convert` reads once.
        note: what else to know, in a line.
        groups: of a Mamba-2, whose heads are 64 wide and have 128 states; 0 for the others.
    """

    name: str
    use: str
    licence: str
    width: int
    layers: int
    tied: bool = True
    vocabulary: int = 50280
    pickled: bool = False
    note: str = ""
    groups: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return sum(map(math.prod, self._shapes().values()))

    def weight_bytes(self, weights: str) -> int:
        """The bytes of memory that the weights take as "f32", "bf16", "int8" or "int4".

        Example:
            >>> KNOWN_MODELS[0].weight_bytes("f32") == 4 * KNOWN_MODELS[0].parameters
            True
        """
        from anymamba.runtime.weights import bytes_of

        return sum(bytes_of(name, shape, weights) for name, shape in self._shapes().items())

    def command(self) -> str:
        """What to type to try it."""
        use = 'generate "Mamba is"' if self.use == "base" else "chat"
        if not self.pickled:
            return f"anymamba {use} -m {self.name} --weights int8"
        folder = "./" + self.name.rpartition("/")[2]
        return f"anymamba convert {self.name} {folder} && anymamba {use} -m {folder} --weights int8"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        sizes = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }
        heads = {"num_heads": self.width * 2 // 64, "head_dim": 64, "n_groups": self.groups}
        return expected_shapes({**sizes, **heads, "model_type": "mamba2"} if self.groups else sizes)


_FALCON_LICENCE = "TII Falcon-Mamba License 2.0"

# Sizes: table 12 of the paper (arXiv 2312.00752) for state-spaces', the cards for the others.
KNOWN_MODELS = (
    KnownModel("state-spaces/mamba-130m-hf", "base", "apache-2.0", 768, 24),
    KnownModel("state-spaces/mamba-370m-hf", "base", "apache-2.0", 1024, 48),
    KnownModel("state-spaces/mamba-790m-hf", "base", "apache-2.0", 1536, 48),
    KnownModel("state-spaces/mamba-1.4b-hf", "base", "apache-2.0", 2048, 48),
    KnownModel("state-spaces/mamba-2.8b-hf", "base", "apache-2.0", 2560, 64),
    KnownModel(
        *("TRI-ML/mamba-7b-rw", "base", "apache-2.0", 4096, 64),
        tied=False,
        vocabulary=50432,
        note="trained on RefinedWeb, in English",
    ),
    KnownModel(
        *("tiiuae/falcon-mamba-7b", "base", _FALCON_LICENCE, 4096, 64),
        tied=False,
        vocabulary=65024,
        note="Falcon-Mamba, trained on 5.5 trillion tokens, mainly English",
    ),
    *(
        KnownModel(
            *(f"state-spaces/mamba2-{size}", "base", "apache-2.0", width, layers),
            vocabulary=50288,
            pickled=True,
            note="Mamba-2",
            groups=1,
        )
        for size, width, layers in (
            ("130m", 768, 24),
            ("370m", 1024, 48),
            ("780m", 1536, 48),
            ("1.3b", 2048, 48),
            ("2.7b", 2560, 64),
        )
    ),
    KnownModel(
        *("mistralai/Mamba-Codestral-7B-v0.1", "base", "apache-2.0", 4096, 64),
        tied=False,
        vocabulary=32768,
        note="Mamba-2 for code",
        groups=8,
    ),
    KnownModel(
        *("havenhq/mamba-chat", "chat", "apache-2.0", 2560, 64),
        pickled=True,
        note="mamba-2.8b tuned on 16,000 conversations of UltraChat; Zephyr's prompt format",
    ),
    KnownModel(
        *("xiuyul/mamba-2.8b-zephyr", "chat", "apache-2.0", 2560, 64),
        pickled=True,
        note="mamba-2.8b-slimpj tuned on UltraChat, then by DPO on UltraFeedback",
    ),
    KnownModel(
        *("tiiuae/falcon-mamba-7b-instruct", "chat", _FALCON_LICENCE, 4096, 64),
        tied=False,
        vocabulary=65024,
        note="falcon-mamba-7b tuned to follow instructions; has a chat template",
    ),
)
"""The smallest first, chat-tuned ones last."""
