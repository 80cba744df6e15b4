"""`anymamba run`: run a Python program in which AnyMamba stands for `mamba_ssm`."""

from __future__ import annotations

import builtins
import io
import runpy
import sys
import zipfile
from argparse import REMAINDER
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from anymamba.cli.options.fields import flag, option
from anymamba.cli.terminal.output import tell
from anymamba.errors import InputError
from anymamba.upstream import PACKAGES

USAGE = (
    "anymamba run [-h] [--force] [--own PACKAGE] [--no-decode-steps] "
    "(SCRIPT | -m MODULE) [ARGUMENTS ...]"
)

DESCRIPTION = """\
Run a Python program as `python` would, with imports of mamba_ssm and causal_conv1d answered by
AnyMamba. Where these packages are installed, calls with CUDA tensors still go to them. A package of
that name in the program's own folder is left alone, and AnyMamba answers its compiled extensions.
Without CUDA, a program that names the device "cuda" gets the CPU, and is told so once.
"""
EXAMPLES = """\
examples:
  anymamba run train.py --epochs 3
  anymamba run -m package.module --help
  anymamba run --own mamba_ssm vision.py    a fork is installed: leave it alone
  anymamba run --force compare.py
"""


@dataclass(frozen=True)
class Options:
    """What `anymamba run` is asked for."""

    force: bool = flag(
        "--force",
        "stand for every package of these names: take calls with CUDA tensors, too, and pass "
        "over packages in the program's folder",
    )
    own: Sequence[str] = option(
        "--own",
        action="append",
        default=[],
        choices=PACKAGES,
        metavar="PACKAGE",
        help="leave an installed mamba_ssm or causal_conv1d alone, a fork for example, and answer "
        "its compiled extensions only",
    )
    decode_steps: bool = option(
        "--no-decode-steps",
        action="store_false",
        help="leave the mixers of Transformers' models as they are: only functions that they look "
        "up are AnyMamba's",
    )
    module: Sequence[str] | None = option(
        "-m",
        nargs=REMAINDER,
        metavar="MODULE",
        help="run a module, as python -m does; the rest are its arguments",
    )
    script: Sequence[str] = option(
        nargs=REMAINDER,
        metavar="FILE",
        help="a script, folder or zip file; the rest are its arguments",
    )


def run(options: Options) -> None:
    """Install the drop-in, and be the program from here on, which ends in a SystemExit."""
    words = options.module or options.script
    if not words:
        what = "a script" if options.module is None else "a module after -m"
        raise InputError(f"anymamba run needs {what} (see anymamba run --help)")
    program, folder = module(words[0]) if options.module else script(words[0])
    own = packages_of_its_own(options, folder)
    TakeOver(options.force, frozenset(own), options.decode_steps)()
    sys.argv[:] = words
    # The first place is the folder of the `anymamba` command, unless Python was told to have none.
    if not sys.flags.safe_path:
        sys.path[0] = folder
    sys.modules["__main__"] = main = ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={})
    undisturbed(program)


@dataclass(frozen=True)
class TakeOver:
    """Has AnyMamba stand for the packages in this process, and in those that it starts anew.

    Args:
        force, own, decode_steps: as for `dropin.install`.
    """

    force: bool
    own: frozenset[str]
    decode_steps: bool

    def __call__(self) -> None:
        from anymamba import dropin

        dropin.install(force=self.force, own=self.own, decode_steps=self.decode_steps)
        # Not earlier, because programs set variables of the environment that PyTorch reads when it
        # is imported.
        once_imported("torch", lambda torch: put_cuda_on_the_cpu())
        once_imported("multiprocessing.spawn", self.hand_on)

    def hand_on(self, spawn: Any) -> None:
        """Have what multiprocessing sends to a new process take that over as well.

        Such a process imports the program's module anew, which may import the packages. What it
        reads first is the dict made here, of which it uses the keys that it knows.
        """
        make_data = spawn.get_preparation_data

        @wraps(make_data)
        def with_take_over(name: str) -> dict[str, Any]:
            return {**make_data(name), "anymamba": _WhenRead(self)}

        spawn.get_preparation_data = with_take_over


class _WhenRead:
    """A value whose unpickling takes over the process that reads it."""

    def __init__(self, take_over: TakeOver) -> None:
        self._take_over = take_over

    def __reduce__(self) -> tuple[Callable[[TakeOver], None], tuple[TakeOver]]:
        return TakeOver.__call__, (self._take_over,)


def once_imported(name: str, act: Callable[[ModuleType], object]) -> None:
    """Act on a module as soon as it is imported, or now if it was before."""
    from anymamba.dropin.common.after_import import AfterImportFinder

    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, AfterImportFinder({name: act}))


def packages_of_its_own(options: Options, folder: str) -> set[str]:
    """The packages to leave alone: those asked for, and those in the program's folder."""
    specs = {name: PathFinder.find_spec(name, [folder]) for name in PACKAGES}
    # A folder without modules, a clone for example, is passed over by Python, too.
    beside = [name for name, spec in specs.items() if spec is not None and spec.has_location]
    for name in beside:
        if options.force:
            tell(f"anymamba: the program's own {name}, a fork perhaps, is passed over: --force")
        else:
            tell(
                f"anymamba: {name} is the program's own, from {folder}; AnyMamba answers its "
                "compiled extensions (--force takes AnyMamba's)"
            )
    return {*options.own, *([] if options.force else beside)}


def put_cuda_on_the_cpu() -> None:
    """Let the CPU stand for CUDA from now on, where PyTorch has none."""
    import torch

    if not torch.cuda.is_available():
        from anymamba.dropin.cuda_on_cpu import CudaOnCpu

        CudaOnCpu(lambda line: tell(f"anymamba: {line}")).__enter__()


Program = Callable[[], object]


def module(name: str) -> tuple[Program, str]:
    """What runs a module, and the first place where it finds others."""
    # Python's own function for `-m`, which looks for the module when it is called.
    program: Callable[[str], object] = runpy._run_module_as_main  # type: ignore[attr-defined]
    return lambda: program(name), str(Path.cwd())


def script(name: str) -> tuple[Program, str]:
    """What runs a script, and the first place where it finds others."""
    path = Path(name)
    if path.is_dir() or (path.is_file() and zipfile.is_zipfile(path)):
        as_main: Callable[..., object] = runpy._run_module_as_main  # type: ignore[attr-defined]
        return lambda: as_main("__main__", alter_argv=False), str(path.absolute())
    try:
        with io.open_code(str(path.absolute())) as file:
            source = file.read()
    except OSError as error:
        raise InputError(f"cannot open the program {name!r}: {error.strerror}") from None
    return lambda: as_script(source, str(path.absolute())), str(path.resolve().parent)


def as_script(source: bytes, file: str) -> None:
    """Run the text of a script in the module `__main__`."""
    names = vars(sys.modules["__main__"])
    names.update(__file__=file, __loader__=SourceFileLoader("__main__", file), __cached__=None)
    exec(compile(source, file, "exec", dont_inherit=True), names)


def undisturbed(program: Program) -> NoReturn:
    """Let a program end as under Python: how it ended is told by it, not by this command."""
    try:
        program()
    except Exception as error:
        fail(error, 1)
    except KeyboardInterrupt as error:
        fail(error, 130)
    raise SystemExit


def fail(error: BaseException, status: int) -> NoReturn:
    """Show the traceback of a program without the frames of this file, and end."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    raise SystemExit(status)
