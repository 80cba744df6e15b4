"""Programs that run in forks of a process which has imported PyTorch and Transformers.

That import takes seconds, and a fork of it none. Such a program has its own arguments, folder,
environment and streams, and its signals and exit status are passed on; only the import is not its
own. Where the import is what is tested, start `sys.executable`.

A `Warm` has a folder with two commands: `python` for scripts and for `-m anymamba train`, and
`anymamba`. Both leave to the real ones what needs no PyTorch. Where the system cannot fork or hand
streams on, as only Linux can, the real ones stand in for them, and take their time.
"""

import array
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

NEED_TORCH = ("train", "finetune", "evaluate", "run")
CLIENT = """\
#!{python} -SE
import array, json, os, signal, socket, sys

arguments = [*{first!r}, *sys.argv[1:]]
if arguments[:2] == ["-m", "anymamba"]:
    warm = len(arguments) > 2 and arguments[2] in {commands!r}
else:
    warm = arguments[:1] != [] and not arguments[0].startswith("-")
if not warm:
    os.execv({python!r}, [{python!r}, *arguments])
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.connect({address!r})
call = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode() + b"\\n"
server.sendmsg([b"\\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(call)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(process, number))
sys.exit(int(answers.readline() or 1))
"""


class Warm:
    """A process that has imported what is slow, and the commands that fork it."""

    def __init__(self, folder: Path) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self.commands, self.python = Path(sys.executable).parent, sys.executable
        """A folder of commands, and what stands in place of `sys.executable`."""
        if hasattr(os, "pidfd_open"):
            self.commands, self.python = folder / "bin", str(folder / "bin" / "python")
            self._server = self._start(folder / "socket")

    def _start(self, address: Path) -> subprocess.Popen[bytes]:
        self.commands.mkdir()
        for name, first in (("python", []), ("anymamba", ["-m", "anymamba"])):
            command = self.commands / name
            command.write_text(
                CLIENT.format(
                    python=sys.executable, first=first, commands=NEED_TORCH, address=str(address)
                )
            )
            command.chmod(0o755)
        server = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from tests.support.warm import serve; serve({str(address)!r})",
            ],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
        )
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        return server

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.communicate()


def serve(address: str) -> None:
    """Fork for each call, for ever."""
    import transformers

    import anymamba.training.finetune.run
    import anymamba.training.pretrain.run  # noqa: F401

    for name in ("Trainer", "PreTrainedTokenizerFast", "DataCollatorWithPadding"):
        getattr(transformers, name)  # which Transformers imports when it is asked for
    assert anymamba.MambaForCausalLM
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _supervise(connection)
        connection.close()


def _supervise(connection: socket.socket) -> None:
    """Fork once more for the program, and tell the caller its id and then its status."""
    streams = array.array("i")
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(ancillary[0][2])
    arguments, folder, environment = json.loads(connection.makefile().readline())
    process = os.fork()
    if process == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 256)
        return _run(arguments, folder, environment)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    connection.sendall(b"%d\n" % process)
    ended = os.pidfd_open(process)
    while ended not in (ready := select.select([ended, connection], [], [])[0]):
        if connection in ready and connection.recv(1) == b"":  # the caller was killed
            os.kill(process, signal.SIGKILL)
            break
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        connection.sendall(b"%d\n" % (status if status >= 0 else 128 - status))
    finally:
        os._exit(0)


def _run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], ""
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")
