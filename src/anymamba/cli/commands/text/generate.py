"""`anymamba generate`: continue a text with a model, showing it as it comes."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from anymamba.checkpoint.io import check_writable
from anymamba.cli.load_engine import beginning_state, model_name, open_engine
from anymamba.cli.options.fields import flag, integer_option, option
from anymamba.cli.options.model import WEIGHTS, AdapterOptions, EngineOptions
from anymamba.cli.options.sampling import SamplingOptions, sampling_settings
from anymamba.cli.summary import Continuation, ended_by, figures_line, figures_of
from anymamba.cli.terminal.output import Output, json_line, tell
from anymamba.cli.terminal.silence import silence
from anymamba.cli.text.prompt import prompt_from
from anymamba.errors import InputError, MissingDependencyError, StateError

if TYPE_CHECKING:
    from anymamba.runtime.generation import TokenOutput

DESCRIPTION = """\
Continue a text. What the model writes goes to standard output as it comes, without the prompt;
figures go to standard error when it is done.

Without PROMPT the prompt is read from standard input. One line end at its end is dropped there,
as `echo` adds it. An empty prompt is continued where the model knows a token for the beginning
of a text, or where a state says what comes next; the bundled model has no such token.
"""
EXAMPLES = """\
examples:
  anymamba generate "ROMEO:" --max-new-tokens 300
  echo "Mamba is" | anymamba generate --model state-spaces/mamba-130m-hf --temperature 0
  anymamba generate "ROMEO:" --stop "JULIET:" --json
  anymamba generate "In short:" --state book.state --weights int8
  anymamba generate --prompts prompts.jsonl --temperature 0 > answers.jsonl
"""
# --dtype has PyTorch's names of types; these the runtime has too.
WEIGHTS_OF_DTYPE = {"auto": "auto", "float32": "f32", "bfloat16": "bf16"}
DTYPES = (*WEIGHTS_OF_DTYPE, "float16")


@dataclass(frozen=True)
class Options(AdapterOptions, EngineOptions, SamplingOptions):
    """What `anymamba generate` is asked for."""

    prompt: str | None = option(nargs="?", metavar="PROMPT", help="the text to continue")
    prompts: str | None = option(
        "--prompts",
        metavar="FILE",
        help="continue many prompts: JSON lines, each a text or an object with a prompt; one JSON "
        "line comes out for each; - is standard input",
    )
    batch: int | None = integer_option(
        "--batch", high=4096, help="how many of --prompts are continued side by side; default 16"
    )
    echo: bool = flag("--echo", "print the prompt before its continuation")
    json: bool = flag("--json", "print one JSON object at the end")
    state: str | None = option("--state", metavar="FILE", help="the state to go on from")
    save_state: str | None = option(
        "--save-state", metavar="FILE", help="where to store the state after the new text"
    )
    device: str = option(
        "--device", default="cpu", help="cpu, or where PyTorch is to compute, such as cuda"
    )
    dtype: str | None = option("--dtype", choices=DTYPES, help="weight type, as PyTorch names it")


def run(options: Options) -> None:
    """Load the model, continue the prompt, and print."""
    if options.save_state is not None:
        check_writable(options.save_state, StateError)
    if options.prompts is not None:
        from anymamba.cli.text.prompt_lines import continue_prompts

        with silence():
            continue_prompts(options, weights_of(options))
        return
    if options.batch is not None:
        raise InputError("--batch says how many of --prompts are continued side by side: give both")
    # A state can be continued without another word.
    prompt = prompt_from(options.prompt, needed=options.state is None)
    beginning = prompt if options.echo else ""
    with silence(), Output(beginning, visible=not options.json) as output:
        if through_torch(options):
            from anymamba.cli.torch_generation import continue_with_torch

            continuation = continue_with_torch(options, prompt, output)
        else:
            continuation = continue_text(options, prompt, output)
    report(options, prompt, continuation)


def through_torch(options: Options) -> bool:
    """Whether PyTorch computes: where it was asked to, or where there is no native core."""
    if options.device != "cpu":
        return True
    if find_spec("anymamba._core") is not None:
        return False
    if find_spec("torch") is None:
        raise MissingDependencyError(
            "AnyMamba was installed without its native core, and PyTorch is not there to stand "
            "in: install a C++ compiler (GCC or Clang) and anymamba again, or "
            "pip install 'anymamba[torch]'"
        )
    tell("anymamba: without its native core; PyTorch computes, more slowly")
    return True


def continue_text(options: Options, prompt: str, output: Output) -> Continuation:
    """Let the runtime continue the prompt."""
    engine = open_engine(replace(options, weights=weights_of(options)))
    settings = sampling_settings(options, engine.suggested_sampling)
    state = beginning_state(engine, options.state)
    prompt_ids = engine.tokenize(prompt, special=state.token_count == 0)
    start = time.perf_counter()
    with closing(engine.stream(prompt_ids, state=state, **settings)) as stream:
        output.begin()
        pieces: list[TokenOutput] = []
        first_at = start
        for piece in stream:
            first_at = first_at if pieces else time.perf_counter()
            pieces.append(piece)
            output.write(piece.text)
    end = time.perf_counter()
    if not prompt_ids and options.state is None:
        # The engine has begun with the token for it.
        prompt_ids = [engine.config.get("bos_token_id", 0)]
    if options.save_state is not None:
        state.save(options.save_state)
    return Continuation(
        text="".join(piece.text for piece in pieces),
        prompt_ids=prompt_ids,
        ids=[id for piece in pieces for id in piece.ids],
        ended_by=ended_by(pieces[-1].finish_reason),
        seed=settings["seed"],
        prompt_seconds=first_at - start,
        new_seconds=end - first_at,
    )


def weights_of(options: Options) -> str:
    """The kind of weights, which `--dtype` may name as PyTorch does."""
    if options.dtype is None:
        return str(options.weights)
    if options.weights != "auto":
        raise InputError("--dtype and --weights are two names for one thing: give one of them")
    if options.dtype not in WEIGHTS_OF_DTYPE:
        raise InputError(
            f"--dtype {options.dtype} is for PyTorch (--device cuda); the runtime's kinds of "
            f"--weights are {', '.join(WEIGHTS)}"
        )
    return WEIGHTS_OF_DTYPE[options.dtype]


def report(options: Options, prompt: str, continuation: Continuation) -> None:
    """Print the figures, or everything as one object."""
    figures = figures_of(len(continuation.prompt_ids), continuation)
    if not options.json:
        tell(figures_line(figures))
        return
    result = {
        "model": model_name(options),
        "prompt": prompt,
        "text": continuation.text,
        "prompt_tokens": continuation.prompt_ids,
        "new_tokens": continuation.ids,
        "ended_by": continuation.ended_by,
        "seed": continuation.seed,
        "figures": figures,
    }
    print(json_line(result))
