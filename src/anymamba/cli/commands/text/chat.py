"""`anymamba chat`: talk with a model, line by line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anymamba.checkpoint.io import check_writable
from anymamba.cli.load_engine import beginning_state, model_name, open_engine, tokenizer_place
from anymamba.cli.options.fields import flag, option
from anymamba.cli.options.model import AdapterOptions, EngineOptions
from anymamba.cli.options.sampling import SamplingOptions, sampling_settings
from anymamba.cli.terminal.output import json_line, tell, tell_error, write
from anymamba.cli.terminal.silence import silence
from anymamba.errors import AnyMambaError, InputError, StateError

if TYPE_CHECKING:
    from anymamba.cli.chat.conversation import Conversation, Reply
    from anymamba.cli.chat.input import ReadLine

DESCRIPTION = """\
Talk with a model. If its tokenizer has a chat template, the conversation is written by it;
otherwise what is typed continues the text. The model remembers all of it in its state, which
/save and /load keep and bring back at once. Lines can also come from a pipe.
"""
COMMANDS_HELP = """\
in the chat:
  a line that ends in \\   goes on in the next one
  \"\"\"                    begins a message of several lines, and ends it
  /save FILE             store the state
  /load FILE             go on from a stored state
  /retry                 answer the last message anew
  /fork                  remember this point
  /back                  return to the last point remembered
  /reset                 return to the beginning
  /help                  show this
  /quit                  leave, as the end of input does
  //                     begins a message with a slash
  Ctrl-C                 end the answer; what was shown counts as said
"""
EXAMPLES = (
    """\
examples:
  anymamba chat
  anymamba chat --model ./my-model --state book.state --temperature 0.6
  anymamba chat --model ./my-chat-model --system "Answer in one sentence."
  printf 'ROMEO:\\n/save romeo.state\\n' | anymamba chat --max-new-tokens 50

"""
    + COMMANDS_HELP
)


@dataclass(frozen=True)
class Options(AdapterOptions, EngineOptions, SamplingOptions):
    """What `anymamba chat` is asked for."""

    state: str | None = option("--state", metavar="FILE", help="the state to begin from")
    system: str | None = option(
        "--system", metavar="TEXT", help="a system message to begin with, for a chat template"
    )
    no_template: bool = flag("--no-template", "continue the text, without a chat template")
    history: str | None = option(
        "--history", metavar="FILE", help="keep the lines typed here, for later chats"
    )
    json: bool = flag("--json", "print one JSON object an answer")


def run(options: Options) -> None:
    """Answer until the input ends."""
    from anymamba.cli.chat.conversation import Conversation
    from anymamba.cli.chat.input import line_reader
    from anymamba.runtime.chat.model_template import find_template

    read_line = line_reader(options.history)
    with silence():
        engine = open_engine(options)
        state = beginning_state(engine, options.state)
        template = None if options.no_template else find_template(tokenizer_place(options))
        settings = sampling_settings(options, engine.suggested_sampling)
        conversation = Conversation(engine, state, settings, template, options.system)
        if options.model is None and options.adapter is None and not options.json:
            tell("the bundled model only continues plays; anymamba models lists models that chat")
        if sys.stdin.isatty():
            how = "its chat template" if template else "plain continuation"
            tell(f"{model_name(options)}, {how}; /help lists commands")
        Chat(conversation, read_line, json_lines=options.json).run()


class Chat:
    """Reads messages, answers them, and obeys commands.

    Args:
        conversation: with the model.
        read_line: where messages come from.
        json_lines: whether to print an answer as a JSON object, rather than as it comes.
    """

    def __init__(
        self, conversation: Conversation, read_line: ReadLine, *, json_lines: bool = False
    ) -> None:
        self._conversation = conversation
        self._read_line = read_line
        self._json_lines = json_lines
        self._commands: dict[str, Callable[[str], object]] = {
            "retry": self._retry,
            "save": self._save,
            "load": self._load,
            "fork": self._fork,
            "back": self._back,
            "reset": self._reset,
            "help": lambda _: tell(COMMANDS_HELP.rstrip()),
        }

    def run(self) -> None:
        """Go on until the input ends, or someone quits.

        On a terminal a mistake is told and the chat goes on, as it does after Ctrl-C; in a pipe
        both end the program, as nobody is there to correct it.
        """
        from anymamba.cli.chat.input import messages

        on_terminal = sys.stdin.isatty()
        typed = messages(self._read_line)
        while True:
            try:
                message = next(typed, None)
                if message is None or message.strip() == "/quit":
                    return
                self._obey(message)
            except AnyMambaError as error:
                if not on_terminal:
                    raise
                tell_error(error)
                # What could not be read has ended the reader of messages.
                typed = messages(self._read_line)
            except KeyboardInterrupt:
                if not on_terminal:
                    raise
                tell("")
                # The interrupt has ended the reader of messages with the message it was in.
                typed = messages(self._read_line)

    def _obey(self, message: str) -> None:
        if not message.startswith("/") or message.startswith("//"):
            self._answer(message.removeprefix("/") if message.startswith("//") else message)
            return
        name, _, rest = message.removeprefix("/").partition(" ")
        command = self._commands.get(name.strip())
        if command is None:
            raise InputError(f"there is no command /{name.strip()}: /help lists them")
        command(rest.strip())

    def _answer(self, message: str) -> None:
        self._end(self._conversation.say(message, self._show))

    def _retry(self, _: str) -> None:
        self._end(self._conversation.retry(self._show))

    def _show(self, piece: str) -> None:
        if not self._json_lines:
            write(piece)

    def _end(self, reply: Reply) -> None:
        """End an answer's line, and mark one that was cut off."""
        if self._json_lines:
            facts = {"text": reply.text, "new_tokens": reply.ids, "ended_by": reply.ended_by}
            print(json_line(facts), flush=True)
        elif not reply.text.endswith("\n"):
            write("\n")
        if reply.ended_by == "length" and not self._json_lines:
            tell(f"[cut off after {len(reply.ids)} tokens; -n allows more]")
        if reply.ended_by == "interrupt" and not sys.stdin.isatty():
            raise KeyboardInterrupt

    def _save(self, file: str) -> None:
        need_file(file, "/save")
        check_writable(file, StateError)
        self._conversation.save(file)
        tell(f"saved {self._conversation.token_count} tokens in {file}")

    def _load(self, file: str) -> None:
        self._conversation.load(need_file(file, "/load"))
        tell(f"loaded {self._conversation.token_count} tokens")

    def _fork(self, _: str) -> None:
        tell(f"fork {self._conversation.fork()}: /back returns here")

    def _back(self, _: str) -> None:
        left = self._conversation.back()
        tell(f"back at {self._conversation.token_count} tokens; forks left: {left}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        tell(f"at the beginning, {self._conversation.token_count} tokens")


def need_file(name: str, command: str) -> str:
    """The file that a command names."""
    if not name:
        raise InputError(f"{command} needs the name of a file")
    return name
