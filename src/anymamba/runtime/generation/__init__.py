"""From logits to text: sampling, stopping, detokenizing as the tokens come."""

from anymamba.renamed import old_names
from anymamba.runtime.generation.batch import Batch, Embedding, embed_batch, write_batch, write_text
from anymamba.runtime.generation.detokenizer import StreamingDetokenizer
from anymamba.runtime.generation.logits_processors import check_numbers
from anymamba.runtime.generation.pooling import POOLING, Pooling
from anymamba.runtime.generation.prompt_scores import PromptScores
from anymamba.runtime.generation.sampling import Sampler
from anymamba.runtime.generation.sampling_settings import (
    Sampling,
    chosen_sampling,
    suggested_sampling,
)
from anymamba.runtime.generation.token_generator import (
    GenerationOutput,
    TokenGenerator,
    TokenOutput,
)

__all__ = [
    "POOLING",
    "Batch",
    "Embedding",
    "GenerationOutput",
    "Pooling",
    "PromptScores",
    "Sampler",
    "Sampling",
    "StreamingDetokenizer",
    "TokenGenerator",
    "TokenOutput",
    "check_numbers",
    "chosen_sampling",
    "embed_batch",
    "suggested_sampling",
    "write_batch",
    "write_text",
]

__getattr__ = old_names(__name__)
