"""A file is there whole or not at all."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from anymamba.checkpoint import write_atomically
from anymamba.errors import CheckpointError
from tests.support.files import one_line, refusal


def write(text):
    return lambda path: path.write_text(text) and None


def test_creates_and_replaces(tmp_path):
    target = tmp_path / "state.safetensors"
    write_atomically(target, write("one"))
    write_atomically(str(target), write("two"))
    assert target.read_text() == "two"
    assert list(tmp_path.iterdir()) == [target]


def test_the_old_file_is_there_while_the_new_is_written(tmp_path):
    target = tmp_path / "state"
    target.write_text("old")

    def look(path):
        path.write_text("ne")
        assert target.read_text() == "old"
        assert path.parent.parent == target.parent
        assert path.name == target.name
        path.write_text("new")

    write_atomically(target, look)
    assert target.read_text() == "new"


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("before", [True, False])
def test_a_failure_changes_nothing(tmp_path, error, before):
    target = tmp_path / "state"
    if before:
        target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(target, fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == (["old"] if before else [])


def test_a_killed_process_changes_nothing(tmp_path):
    target = tmp_path / "state"
    target.write_text("old")
    program = (
        "import os, sys\n"
        "from anymamba.checkpoint import write_atomically\n"
        "def die(path):\n"
        "    path.write_text('half')\n"
        "    os._exit(9)\n"
        "write_atomically(sys.argv[1], die)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(target)], check=False).returncode == 9
    assert target.read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
def test_mode_and_links(tmp_path):
    previous = os.umask(0o027)
    try:
        write_atomically(tmp_path / "state", write("one"))
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640
    link = tmp_path / "link"
    link.symlink_to("state")
    write_atomically(link, write("two"))
    assert link.is_symlink()
    assert (tmp_path / "state").read_text() == "two"


def test_no_folder(tmp_path):
    place = tmp_path / "nowhere" / "state"
    assert "No such file" in refusal(CheckpointError, write_atomically, place, write("one"))


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "state").mkdir()
    place = tmp_path / "state"
    assert "it is not a file" in refusal(CheckpointError, write_atomically, place, write("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    """A device such as /dev/null neither; a pipe stands for it here."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is not a file"):
        write_atomically(tmp_path / "pipe", write("one"))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "choose a place that you may write to"),
        (errno.EROFS, "choose a place that you may write to"),
    ],
)
@pytest.mark.parametrize("moment", ["writing", "flushing", "making the folder"])
@pytest.mark.parametrize("before", [True, False])
def test_what_the_system_refuses_is_said_with_what_to_do(
    tmp_path, monkeypatch, number, advice, moment, before
):
    target = tmp_path / "state"
    if before:
        target.write_text("old")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    def half(path):
        path.write_text("half")
        if moment == "writing":
            fail()

    if moment == "flushing":
        monkeypatch.setattr("os.fsync", fail)
    elif moment == "making the folder":
        monkeypatch.setattr("tempfile.mkdtemp", fail)
    with pytest.raises(CheckpointError, match=rf"cannot write '.*state': .*; {advice}") as caught:
        write_atomically(target, half)
    one_line(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == (["old"] if before else [])


def test_an_error_of_ours_stays_what_it_is(tmp_path):
    def fail(path):
        raise CheckpointError("the source is broken")

    with pytest.raises(CheckpointError, match=r"^the source is broken$"):
        write_atomically(tmp_path / "state", fail)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_private_file_stays_private(tmp_path):
    target = tmp_path / "private.state"
    target.write_text("old")
    target.chmod(0o600)
    write_atomically(target, lambda path: path.write_text("new") and None)
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600


class InUse(PermissionError):
    """What Windows says of a file that a process has open."""

    winerror = 32


@pytest.mark.parametrize("times", [1, 3])
def test_a_file_that_is_in_use_for_a_moment_is_replaced_after_it(tmp_path, monkeypatch, times):
    target, replace, refused = tmp_path / "state", os.replace, []

    def at_times(*places):
        if len(refused) < times:
            refused.append(places)
            raise InUse(errno.EACCES, "The process cannot access the file")
        replace(*places)

    target.write_text("old")
    monkeypatch.setattr("os.replace", at_times)
    write_atomically(target, write("new"))
    assert (target.read_text(), len(refused)) == ("new", times)


def test_a_file_that_stays_in_use_is_named_with_what_to_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise InUse(errno.EACCES, "The process cannot access the file")

    target = tmp_path / "state"
    target.write_text("old")
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(CheckpointError, match="end the programs that have it open") as caught:
        write_atomically(target, write("new"))
    one_line(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_where_access_is_denied_permission_comes_first(tmp_path, monkeypatch):
    """Windows says so of what one may not write to, and of what is in use for a moment."""

    class Denied(PermissionError):
        winerror = 5

    refused, replace = [], os.replace

    def at_times(*places):
        if len(refused) < times:
            refused.append(places)
            raise Denied(errno.EACCES, "Access is denied")
        replace(*places)

    monkeypatch.setattr("os.replace", at_times)
    times = 2
    write_atomically(tmp_path / "state", write("new"))
    times = 100
    advice = "Access is denied; choose a place that you may write to, or end the programs"
    with pytest.raises(CheckpointError, match=advice) as caught:
        write_atomically(tmp_path / "state", write("newer"))
    one_line(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_what_is_not_permitted_is_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def refuse(*places):
        calls.append(places)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(CheckpointError, match="choose a place that you may write to"):
        write_atomically(tmp_path / "state", write("new"))
    assert len(calls) == 1


def test_a_folder_that_does_not_open_is_not_flushed(tmp_path, monkeypatch):
    """Windows opens no folder; elsewhere one may be open to writers and closed to readers."""
    opened = os.open

    def open_file(path, *rest, **options):
        if os.path.isdir(path):  # noqa: PTH112
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *rest, **options)

    monkeypatch.setattr("os.open", open_file)
    write_atomically(tmp_path / "state", write("new"))
    assert (tmp_path / "state").read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="Windows replaces no file that is read-only")
def test_a_file_reaches_the_disk_before_it_may_not_be_written_to(tmp_path, monkeypatch):
    """Nobody but root opens it then, to have it flushed."""
    flushed, fsync = [], os.fsync

    def note(descriptor):
        flushed.append(os.fstat(descriptor).st_mode & 0o777)
        fsync(descriptor)

    target = tmp_path / "state"
    target.write_text("old")
    target.chmod(0o444)
    monkeypatch.setattr("os.fsync", note)
    write_atomically(target, write("new"))
    assert flushed[0] & stat.S_IWUSR
    assert target.stat().st_mode & 0o777 == 0o444


def test_macos_is_asked_to_bring_a_file_to_the_disk_itself(tmp_path, monkeypatch):
    """Its fsync stops at the memory of the drive. A disk that cannot do more gets an fsync."""
    fcntl = pytest.importorskip("fcntl", reason="macOS has fcntl")
    asked = []

    def full(descriptor, command):
        asked.append(command)
        if len(asked) > 1:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    synced = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr("os.fsync", synced.append)
    write_atomically(tmp_path / "state", write("new"))
    assert asked == [51, 51]  # the file, and its folder
    assert len(synced) == 1
