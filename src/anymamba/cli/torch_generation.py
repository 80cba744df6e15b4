"""`anymamba generate` through PyTorch: on a GPU, or where the native core is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anymamba.cli.options.sampling import sampling_settings
from anymamba.cli.summary import Continuation
from anymamba.errors import BackendError, InputError

if TYPE_CHECKING:
    import torch

    from anymamba import MambaForCausalLM
    from anymamba.cli.commands.text.generate import Options
    from anymamba.cli.terminal.output import Output
    from anymamba.runtime.generation import StreamingDetokenizer

DTYPES = {"auto": "auto", "f32": "float32", "bf16": "bfloat16"}
# What PyTorch's path has no counterpart of, by the value that asks for nothing.
WITHOUT_COUNTERPART = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": [],
    "stop_id": [],
    "state": None,
    "save_state": None,
    "adapter": None,
    "matmul_dtype": None,
    "deterministic": False,
}


def continue_with_torch(options: Options, prompt: str, output: Output) -> Continuation:
    """Load the model with PyTorch, and continue the prompt."""
    from anymamba.assets import bundled_model
    from anymamba.checkpoint import resolve
    from anymamba.checkpoint.tokenizer import read_tokenizer
    from anymamba.runtime.generation import StreamingDetokenizer, suggested_sampling
    from anymamba.runtime.loading import generation_config

    refuse_others(options)
    folder = resolve(options.model or bundled_model(), offline=options.offline)
    settings = sampling_settings(options, suggested_sampling(generation_config([folder]) or {}))
    tokenizer = read_tokenizer(options.tokenizer or folder)
    prompt_ids = tokenizer.encode(prompt).ids
    dtype = options.dtype or DTYPES[options.weights]
    model = load_model(folder, options.device, dtype)
    prompt_ids = prompt_ids or [first_token(model)]
    check_vocabulary(model, prompt_ids)
    output.begin()
    stream = StreamingDetokenizer(tokenizer.decode, options.stop)
    return write(model, prompt_ids, Listener(stream, output.write), settings)


def refuse_others(options: Options) -> None:
    """Refuse options that only the runtime knows, rather than leave them aside in silence."""
    if options.weights not in DTYPES:
        raise BackendError(
            f"--weights {options.weights} needs the native core: PyTorch computes with "
            f"{', '.join(DTYPES)} here"
        )
    for name, nothing in WITHOUT_COUNTERPART.items():
        if getattr(options, name) != nothing:
            option = "--" + name.replace("_", "-")
            raise BackendError(f"{option} needs the native core and --device cpu")


def load_model(folder: Path, device_name: str, dtype: str) -> MambaForCausalLM:
    """The model, on the device and in the type asked for, ready to generate."""
    from anymamba import load_causal_lm
    from anymamba.devices import find_device

    device = find_device(device_name)
    if dtype == "auto" and device.type == "cpu":
        # Few CPUs have fast arithmetic in the narrow types that models are stored in.
        dtype = "float32"
    # Behind the imports above, whose errors say what to install.
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # standard error belongs to errors and figures
    model = load_causal_lm(folder, dtype=dtype)
    # Transformers hides the type of this method from type checkers.
    cast(Any, model).to(device)
    return model


def first_token(model: MambaForCausalLM) -> int:
    """The token to begin a text with when the prompt is empty."""
    token = model.config.bos_token_id
    if token is None:
        raise InputError(
            "the prompt is empty, and this model has no token for the beginning of a text: "
            "give at least one character"
        )
    return int(token)


def check_vocabulary(model: MambaForCausalLM, prompt_ids: Sequence[int]) -> None:
    """Refuse tokens that the model does not have."""
    if max(prompt_ids) >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer does not belong to the model: it makes token {max(prompt_ids)} of "
            f"the prompt, and the model has {model.config.vocab_size} tokens"
        )


class Listener:
    """Hands each new token to a text stream, and says when the text has come to a stop string.

    To `generate` of Transformers it is a stopping criterion. A streamer would be told of a token
    only after the decision whether to stop, one token too late for a stop string.
    """

    def __init__(self, stream: StreamingDetokenizer, show: Callable[[str], object]) -> None:
        self.first_token_at: float | None = None
        self.text = ""
        self.stream = stream
        self._show = show

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Receive all tokens there are, the newest last; return whether to stop."""
        import torch

        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self._give(self.stream.add(int(input_ids[0, -1])))
        return input_ids.new_full((1,), self.stream.stop_string is not None, dtype=torch.bool)

    def finish(self) -> None:
        """Show what was held back."""
        self._give(self.stream.finish())

    def _give(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._show(piece)


def write(
    model: MambaForCausalLM, prompt_ids: Sequence[int], listener: Listener, settings: dict[str, Any]
) -> Continuation:
    """Let the model write until a limit, a stop string or its end token."""
    import torch
    from transformers import StoppingCriteriaList

    torch.manual_seed(settings["seed"])
    given = torch.tensor([list(prompt_ids)], device=model.device)
    start = time.perf_counter()
    # Transformers' annotations deny this method to every model but its own.
    output = cast(Any, model).generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=settings["max_new_tokens"],
        repetition_penalty=settings["repetition_penalty"],
        stopping_criteria=StoppingCriteriaList([listener]),
        **sampling(settings),
    )
    listener.finish()
    tokens = output[0, len(prompt_ids) :].tolist()
    end = time.perf_counter()
    first = listener.first_token_at or end
    return Continuation(
        text=listener.text,
        prompt_ids=list(prompt_ids),
        ids=tokens,
        ended_by=ending(model, tokens, listener.stream),
        seed=settings["seed"],
        prompt_seconds=first - start,
        new_seconds=end - first,
    )


def sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """How to choose a token, as `generate` of Transformers names it."""
    if settings["temperature"] == 0:
        return {"do_sample": False}
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    return {"do_sample": True} | {name: settings[name] for name in names}


def ending(model: MambaForCausalLM, tokens: Sequence[int], stream: StreamingDetokenizer) -> str:
    """What ended the text: a stop string ("stop"), the model's end token ("end"), or "length"."""
    if stream.stop_string is not None:
        return "stop"
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return "end" if tokens[-1] in ends else "length"
