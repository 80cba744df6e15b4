"""The runtime's face: a model that reads, writes and scores texts, without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymamba.runtime.generation import (
    Batch,
    GenerationOutput,
    Sampler,
    Sampling,
    TokenGenerator,
    TokenOutput,
    chosen_sampling,
    embed_batch,
    write_batch,
    write_text,
)
from anymamba.runtime.network import CHUNK_TOKENS, Network
from anymamba.runtime.old_engine import OldNames
from anymamba.runtime.prefill import Progress, all_logits, read_texts
from anymamba.runtime.prompts import Text, as_list, first_ids, ids_to_read
from anymamba.runtime.scoring import Score, score_ids
from anymamba.runtime.state import BatchState, State, check_state, load_state
from anymamba.runtime.tokenizer import TextCodec
from anymamba.runtime.weights import Weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Engine(OldNames):
    """A model in the native core, as `anymamba.load` opens it.

    It keeps nothing of what it reads: that is in the `State` that a call continues from and
    leaves behind. So threads may share an engine, each with states of its own.

    Args:
        weights: the model's tensors and config.
        open_tokenizer: finds the tokenizer, once a text is to be read or written; None where the
            model has none. It then reads tokens and writes tokens, whose text is empty.
        end_ids: the tokens that end a text.
        threads: how many threads compute; None takes `ANYMAMBA_NUM_THREADS`, else all processors.
        suggested_sampling: as for the attribute.
        matmul_dtype, deterministic: as `anymamba.load` has them.

    Attributes:
        weights: as given.
        config: the model's config, in Transformers' names.
        identity: which model states of this engine belong to.
        weight_type: "f32", "bf16", "f16", "int8" or "int4".
        weight_bytes: the bytes that the weights take, which each decoded token reads.
        n_parameters: how many numbers were trained.
        threads: how many threads compute.
        matmul_dtype: what activations are when they are multiplied with bfloat16 weights.
        deterministic: whether a text's logits are the same bits whatever is computed beside it.
        end_ids: the tokens that end a text.
        suggested_sampling: the fields of `Sampling` that the model's generation_config.json sets.
            Nothing uses them unless asked to: `engine.generate(text, **engine.suggested_sampling)`.

    Raises:
        MissingDependencyError: the native core is not installed.
        CheckpointError: the config asks for what the core does not compute.
        BackendError, ConfigError: `matmul_dtype` is none, or not to be had here.

    Example:
        >>> import anymamba
        >>> engine = anymamba.load()
        >>> engine.weight_type, engine.weight_bytes, engine.n_parameters
        ('bf16', 6091776, 3045888)
        >>> engine.generate("ROMEO:", max_new_tokens=5).ids
        [10, 73, 32, 119, 111]
    """

    def __init__(
        self,
        weights: Weights,
        open_tokenizer: Callable[[], Tokenizer] | None,
        end_ids: Collection[int] = (),
        threads: int | None = None,
        suggested_sampling: Mapping[str, Any] | None = None,
        matmul_dtype: str | None = None,
        deterministic: bool = False,
    ) -> None:
        network = self._network = Network(weights, threads, matmul_dtype, deterministic)
        self.identity, self.threads = network.identity, network.threads
        self._codec = TextCodec(open_tokenizer)
        self.weights = weights
        self.config = dict(weights.config)
        self.weight_type = weights.weight_type
        self.weight_bytes = weights.nbytes
        self.n_parameters = weights.n_parameters
        self.matmul_dtype, self.deterministic = network.matmul_dtype, network.deterministic
        self.end_ids = tuple(end_ids)
        self.suggested_sampling = dict(suggested_sampling or {})

    def __repr__(self) -> str:
        sizes = f"{self.n_parameters:,} parameters, {self.weight_type}, {self.threads} threads"
        return f"Engine({sizes})"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, as the `tokenizers` library has it."""
        return self._codec.tokenizer

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Make tokens of a text.

        Args:
            text: any text.
            special: whether to add what the tokenizer puts at a text's beginning and end.

        Raises:
            CheckpointError: the model came without a tokenizer.

        Example:
            >>> import anymamba
            >>> anymamba.load().tokenize("Hi")
            [72, 105]
        """
        return self._codec.encode(text, special)

    def detokenize(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Make a text of tokens.

        Args:
            ids: the tokens.
            skip_special: whether to leave out tokens that stand for no text.

        Returns:
            The text. Bytes that are no UTF-8 become U+FFFD.

        Raises:
            CheckpointError: the model came without a tokenizer.

        Example:
            >>> import anymamba
            >>> anymamba.load().detokenize([72, 105])
            'Hi'
        """
        return self._codec.decode(ids, skip_special)

    def state(self) -> State:
        """Return a new state, before any token.

        Example:
            >>> import anymamba
            >>> anymamba.load().state().token_count
            0
        """
        return State(self.identity)

    def load_state(self, path: str | os.PathLike[str]) -> State:
        """Read a state from a file that `State.save` or `MambaCache.save` wrote.

        Args:
            path: the file.

        Raises:
            StateError: there is no such file, it is broken, or it belongs to another model or to
                other weights. A state fits all kinds of one model's weights.

        Example:
            >>> import anymamba
            >>> anymamba.load().load_state("nowhere")
            Traceback (most recent call last):
            anymamba.errors.StateError: state file 'nowhere' does not exist
        """
        return load_state(path, self.identity)

    def prefill(self, state: State, text: Text, progress: Progress | None = None) -> State:
        """Read a text into a state. It costs no memory however long the text is.

        Args:
            state: advanced in place. If this is interrupted, it has read a part of the text, as
                `token_count` says, and can read on from there.
            text: a text or its tokens. Special tokens are added to the first text of a state.
            progress: called after each chunk with how many tokens were read and how many there
                are.

        Returns:
            The same state.

        Raises:
            StateError: the state belongs to another model.
            InputError: a token is not in the vocabulary; then nothing was read.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> engine.prefill(engine.state(), "ROMEO:").token_count
            6
        """
        blocks = check_state(state).batch_of(self.identity)
        read_texts(self._network, blocks, [ids_to_read(text, self._codec, state)], progress)
        return state

    def logits(self, text: Text, state: State | None = None) -> NDArray[np.float32]:
        """What the model says after each token of a text.

        Args:
            text: l tokens, or their text.
            state: what was read before, advanced in place.

        Returns:
            (l, v) float32: row i is about the token that follows token i.

        Raises:
            StateError: the state belongs to another model.
            InputError: a token is not in the vocabulary; then nothing was read.

        Example:
            >>> import anymamba
            >>> anymamba.load().logits("ROMEO:").shape
            (6, 256)
        """
        state = self._started(state)
        ids_l = ids_to_read(text, self._codec, state)
        return all_logits(self._network, check_state(state).batch_of(self.identity), ids_l)

    def score(self, text: Text, state: State | None = None) -> Score:
        """How well the model predicts a text. It costs little memory however long the text is.

        Args:
            text: a text or its tokens.
            state: what was read before, advanced in place; with it, the first token counts too.

        Returns:
            The log-probabilities of the tokens, and what follows from them.

        Raises:
            StateError: the state belongs to another model.
            InputError: a token is not in the vocabulary; then nothing was read.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> engine.score("the cat").perplexity < engine.score("eht tac").perplexity
            True
        """
        state = self._started(state)
        blocks = check_state(state).batch_of(self.identity)
        return score_ids(self._network, blocks, ids_to_read(text, self._codec, state))

    def embed(
        self, texts: Sequence[Text], pooling: str = "mean", normalize: bool = True
    ) -> NDArray[np.float32]:
        """Make a vector of each text, of what the model's last norm gives for its tokens.

        Args:
            texts: texts or their tokens, none of them empty.
            pooling: "mean" over a text's tokens, or the "last" one's.
            normalize: whether to bring each to length 1.

        Returns:
            (b, d) float32.

        Raises:
            InputError: a text is empty, or there is no such pooling or token.

        Example:
            >>> import anymamba
            >>> anymamba.load().embed(["a rose", "a lily"]).shape
            (2, 256)
        """
        sequences = [ids_to_read(text, self._codec, self.state()) for text in as_list(texts)]
        return embed_batch(self._network, self.identity.sizes, sequences, pooling, normalize)

    def generate(
        self,
        prompt: Text,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        state: State | None = None,
        **settings: Any,
    ) -> GenerationOutput:
        """Continue a text.

        Args:
            prompt: a text or its tokens. It may be empty where a state says what comes next, or
                where the model knows a token for the beginning of a text.
            max_new_tokens: how many tokens are written at most; 200 if nothing says otherwise.
            sampling: how tokens are chosen; the likeliest each time if nothing is said.
            state: what was read before. It is advanced in place, and has in the end read the
                prompt and all new tokens.
            **settings: any fields of `Sampling`, which go before those of `sampling`.

        Returns:
            The new text and its tokens.

        Raises:
            StateError: the state belongs to another model.
            InputError: a setting makes no sense, a token is not in the vocabulary, or there is
                nothing to continue.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> engine.generate("ROMEO:", temperature=0.8, seed=1, stop=[":"]).finish_reason
            'stop'
        """
        chosen = chosen_sampling(sampling, max_new_tokens, settings)
        started = self._started(state)
        ids = self.prompt_ids(prompt, started)
        blocks, generator = started.batch_of(self.identity), self.token_generator(ids, chosen)
        pieces = write_text(self._network, blocks, ids, generator, keep=state is not None)
        return GenerationOutput.of(list(pieces), ids.tolist(), chosen)

    def stream(
        self,
        prompt: Text,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        state: State | None = None,
        **settings: Any,
    ) -> Generator[TokenOutput, None, None]:
        """Continue a text, token by token.

        Args:
            prompt, max_new_tokens, sampling, state, **settings: as for `generate`. If the caller
                stops listening, the state has read all that was given out.

        Returns:
            A generator of pieces, one for each token. The prompt is read when the first is asked
            for; `close()` ends it.

        Raises:
            StateError, InputError: as `generate`.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> "".join(piece.text for piece in engine.stream("ROMEO:", max_new_tokens=5))
            '\\nI wo'
        """
        chosen = chosen_sampling(sampling, max_new_tokens, settings)
        started = self._started(state)
        ids = self.prompt_ids(prompt, started)
        blocks, generator = started.batch_of(self.identity), self.token_generator(ids, chosen)
        return write_text(self._network, blocks, ids, generator, keep=state is not None)

    def generate_batch(
        self,
        prompts: Sequence[Text],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        state: State | None = None,
        **settings: Any,
    ) -> list[GenerationOutput]:
        """Continue several texts side by side, which takes little longer than one.

        Each comes out as it would by itself. Where tokens are drawn by chance, text i does so
        with the seed `seed + i`.

        Args:
            prompts: texts or their tokens, of any lengths.
            max_new_tokens, sampling, **settings: as for `generate`, for all of them.
            state: what was read before each of them. It stays as it is.

        Returns:
            What was written, one for each prompt.

        Raises:
            StateError, InputError: as `generate`.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> batch = engine.generate_batch(["ROMEO:", "JULIET:\\n"], max_new_tokens=5)
            >>> [generation.text for generation in batch]
            ['\\nI wo', 'What ']
        """
        prompts = as_list(prompts)
        chosen = chosen_sampling(sampling, max_new_tokens, settings)
        started = self._started(state)
        blocks = started.batch_of(self.identity).take([0] * len(prompts))
        sequences = [self.prompt_ids(prompt, started) for prompt in prompts]
        generators = [self.token_generator(ids, chosen, row) for row, ids in enumerate(sequences)]
        written = write_batch(self._network, blocks, sequences, generators)
        texts = zip(written, sequences, strict=True)
        return [GenerationOutput.of(pieces, ids.tolist(), chosen) for pieces, ids in texts]

    def batch(self, rows: int, chunk_tokens: int = CHUNK_TOKENS) -> Batch:
        """Return room for texts that are written at the same time, and come and go as they like.

        Args:
            rows: how many texts at most.
            chunk_tokens: how much of their prompts the texts read in a step, all together.

        Example:
            >>> import anymamba
            >>> engine = anymamba.load()
            >>> batch, ids = engine.batch(rows=4), engine.prompt_ids("ROMEO:")
            >>> batch.add(0, ids, engine.token_generator(ids, anymamba.Sampling(max_new_tokens=1)))
            >>> [(row, token.ids) for row, token in batch.step()]
            [(0, (10,))]
        """
        blocks = BatchState.empty(self.identity.sizes, rows)
        return Batch(self._network, blocks, chunk_tokens)

    def token_generator(
        self, ids: NDArray[np.int64], sampling: Sampling, row: int = 0
    ) -> TokenGenerator:
        """What chooses the tokens of one text, and makes text of them.

        Args:
            ids: the prompt.
            sampling: how tokens are chosen.
            row: which of several texts this is; it draws with the seed `seed + row`.

        Raises:
            InputError: a token of the prompt or the settings is not in the vocabulary.
        """
        sampler = Sampler(sampling, ids.tolist(), self._network.vocabulary, row)
        # Without a tokenizer there is no text, unless one is to be found in it.
        has_text = self._codec.exists or sampling.stop
        detokenize = self.detokenize if has_text else lambda ids: ""
        return TokenGenerator(sampler, detokenize, self.end_ids)

    def prompt_ids(self, prompt: Text, state: State | None = None) -> NDArray[np.int64]:
        """The tokens of a prompt, at least one where the state does not say what comes next.

        Args:
            prompt: a text or its tokens.
            state: what was read before; without it the prompt is the beginning of a text, where
                special tokens are added to a text.

        Raises:
            InputError: there is nothing to continue.

        Example:
            >>> import anymamba
            >>> anymamba.load().prompt_ids("Hi").tolist()
            [72, 105]
        """
        state = self._started(state)
        ids = ids_to_read(prompt, self._codec, state)
        return ids if ids.size else first_ids(self.config, state)

    def _started(self, state: State | None) -> State:
        """The state to go on from: a new one where none was given."""
        return self.state() if state is None else check_state(state)
