"""What macOS and Windows lack, taken from AnyMamba's modules, and how Windows treats files in use.

A Python process becomes like such a system by a module `sitecustomize` that calls `become`, so
that those it starts do as well. Only what AnyMamba's own modules import is reduced: other packages,
which have code for each system, work as on this one.
"""

import builtins
import ctypes
import errno
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

SITE = "from tests.systems.other_system import become; become({system!r})\n"

# By module, patterns of the names that a system lacks; a module without any name is missing.
LACKS_ON_MACOS = {
    "os": "sched_.*|pidfd_.*|memfd_.*|MFD_.*|posix_fadvise|posix_fallocate|eventfd.*|getrandom|"
    "splice|copy_file_range|O_DIRECT|O_TMPFILE|O_PATH|O_NOATIME|.*xattr|getres[ug]id|setns|unshare",
    "signal": "SIGRT.*|SIGPWR|SIGSTKFLT|SIGPOLL|SIGCLD|sigtimedwait|sigwaitinfo|pidfd_.*",
    "select": "epoll|EPOLL.*",
    "socket": "AF_NETLINK|AF_PACKET|SO_BINDTODEVICE|SO_PEERCRED|TCP_USER_TIMEOUT",
    "mmap": "MAP_POPULATE|MAP_NORESERVE|MADV_.*HUGEPAGE|MADV_DONTFORK|MADV_REMOVE",
    "time": "CLOCK_BOOTTIME|CLOCK_TAI|pthread_getcpuclockid",
    "spwd": "",
}
LACKS_ON_WINDOWS = {
    "os": LACKS_ON_MACOS["os"] + "|fork.*|wait|wait[34i].*|W[A-Z]+|P_(PID|ALL|PGID|PIDFD)|"
    "getuid|geteuid|getgid.*|getegid|getgroups|setuid|setgid|sete.*|setre.*|setgroups|initgroups|"
    "getpg.*|setpg.*|getsid|setsid|killpg|nice|.*priority|PRIO_.*|mkfifo|mknod|chown|lchown|fchown|"
    "fchmod|lchmod|chroot|fchdir|chflags|f?statvfs|f?pathconf.*|sysconf.*|confstr.*|uname|ttyname|"
    "openpty|ctermid|getloadavg|pread.*|pwrite.*|readv|writev|sendfile|lockf|F_.*|pipe2|fdatasync|"
    "sync|register_at_fork|posix_.*|POSIX_.*|major|minor|makedev|tc[gs]etpgrp|fwalk|"
    "O_(NOFOLLOW|DIRECTORY|CLOEXEC|SYNC|DSYNC|RSYNC|NONBLOCK|NDELAY|NOCTTY|ASYNC|ACCMODE)",
    "signal": "SIG(?!ABRT$|FPE$|ILL$|INT$|SEGV$|TERM$|_DFL$|_IGN$|nals$)[A-Z].*|alarm|.*itimer|"
    "pause|ITIMER_.*|pthread_.*|sig(pending|wait|timedwait|waitinfo|interrupt)|SIG_(UN)?BLOCK|"
    "SIG_SETMASK",
    "select": "e?poll|E?POLL.*|kqueue",
    "socket": LACKS_ON_MACOS["socket"] + "|AF_UNIX|SO_REUSEPORT|SCM_.*|CMSG_.*|recv_fds|send_fds",
    "mmap": "MAP_.*|PROT_.*|MADV_.*",
    "time": "clock_.*|CLOCK_.*|tzset|pthread_getcpuclockid",
    **dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline"), ""),
    **dict.fromkeys(("syslog", "posix", "crypt", "spwd", "curses", "nis"), ""),
    "ctypes": "(?!)",  # nothing, but it has more: ADDED
}
LACKS = {"macos": LACKS_ON_MACOS, "windows": LACKS_ON_WINDOWS}
# What names of files Windows refuses.
REFUSED_NAMES = re.compile(
    r'.*[<>:"|?*\\\x00-\x1f].*|.*[ .]|(con|prn|aux|nul|com\d|lpt\d)(\..*)?', re.IGNORECASE
)


def become(system: str) -> None:
    """Take from AnyMamba's modules what the system lacks."""
    _reduce_imports(LACKS[system])
    if system == "windows":
        _lock_files_in_use()
        _refuse_names()
        _open_no_folders()
    _hide("/proc/", "/sys/")  # last: what stands above looks there


class Kernel32:
    """What AnyMamba calls of Windows' kernel32.dll, with the layout of 64-bit Windows."""

    def __init__(self, name: str) -> None:
        assert name == "kernel32"

        def current_process() -> int:
            return 2**64 - 1

        def memory_info(process: int, counters: Any, size: int) -> int:
            import resource

            assert (process, size) == (2**64 - 1, 72)
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            ctypes.c_uint64.from_buffer(counters._obj, 8).value = most
            return 1

        self.GetCurrentProcess, self.K32GetProcessMemoryInfo = current_process, memory_info


# By module, what a system has that this one lacks.
ADDED: dict[str, dict[str, Any]] = {"ctypes": {"WinDLL": Kernel32}}


class Reduced(ModuleType):
    """A module without some of its names, and with what is added to it."""

    def __init__(self, module: ModuleType, lacking: str) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(ADDED.get(module.__name__, {}))
        self.__dict__["_whole"], self.__dict__["_lacking"] = module, re.compile(lacking)

    def __getattr__(self, name: str) -> Any:
        if self._lacking.fullmatch(name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} here")
        return getattr(self._whole, name)


def _reduce_imports(lacks: dict[str, str]) -> None:
    whole, reduced = builtins.__import__, dict[str, Reduced]()

    def reduced_import(
        name: str,
        globals: Any = None,
        locals: Any = None,
        fromlist: Collection[str] = (),
        level: int = 0,
    ) -> ModuleType:
        importer = (globals or {}).get("__name__") or ""
        if name not in lacks or importer.split(".")[0] != "anymamba":
            return whole(name, globals, locals, fromlist, level)
        if not lacks[name]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        module = whole(name, globals, locals, fromlist, level)
        return reduced.setdefault(name, Reduced(module, lacks[name]))

    builtins.__import__ = reduced_import


def _lock_files_in_use() -> None:
    """Neither replace, rename nor remove a file that this process has open or mapped."""
    replace, rename, unlink = os.replace, os.rename, os.unlink
    read, listdir, readlink = io.open, os.listdir, os.readlink

    def in_use() -> Iterator[str]:
        for number in listdir("/proc/self/fd"):
            try:
                yield readlink(f"/proc/self/fd/{number}")
            except OSError:  # it was listdir's own
                continue
        with read("/proc/self/maps", encoding="utf-8") as maps:
            yield from (line.split(maxsplit=5)[-1].rstrip("\n") for line in maps)

    def check(place: Any) -> None:
        path = os.path.realpath(place)
        if any(other == path or other.startswith(path + "/") for other in in_use()):
            _refuse(place)

    def locked_replace(source: Any, target: Any, **options: Any) -> None:
        check(source), check(target)
        if Path(target).is_dir():
            _refuse(target)
        replace(source, target, **options)

    def locked_rename(source: Any, target: Any, **options: Any) -> None:
        check(source)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file that exists already", target)
        rename(source, target, **options)

    def locked_unlink(place: Any, **options: Any) -> None:
        check(place)
        if not os.stat(place).st_mode & stat.S_IWUSR:  # noqa: PTH116
            _refuse(place)
        unlink(place, **options)

    os.replace, os.rename, os.unlink, os.remove = (
        locked_replace,
        locked_rename,
        locked_unlink,
        locked_unlink,
    )
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    # As on Windows: elsewhere such a file is removed while it is open.
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[misc, assignment]


def _refuse(place: Any) -> NoReturn:
    error = PermissionError(errno.EACCES, "The process cannot access the file", str(place))
    error.winerror = 32  # type: ignore[attr-defined]
    raise error


def _refuse_names() -> None:
    def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(place: Any, *rest: Any, **options: Any) -> Any:
            name = "" if isinstance(place, int) else Path(os.fsdecode(place)).name
            if REFUSED_NAMES.fullmatch(name):
                raise OSError(errno.EINVAL, "The filename syntax is incorrect", str(place))
            return call(place, *rest, **options)

        return checked

    os.mkdir, os.open = refusing(os.mkdir), refusing(os.open)
    io.open = builtins.open = refusing(io.open)


def _open_no_folders() -> None:
    """Nor flush what is open for reading alone."""
    import fcntl

    opened, fsync = os.open, os.fsync

    def open_file(place: Any, *rest: Any, **options: Any) -> int:
        if os.path.isdir(place):  # noqa: PTH112
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return opened(place, *rest, **options)

    def flush(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    os.open, os.fsync = open_file, flush


def _hide(*folders: str) -> None:
    opened = io.open

    def open_file(place: Any, *rest: Any, **options: Any) -> Any:
        if not isinstance(place, int) and os.fsdecode(place).startswith(folders):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(place))
        return opened(place, *rest, **options)

    io.open = builtins.open = open_file
