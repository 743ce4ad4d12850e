"""Files in shared folders: safe opening, writing that is complete or not at all, removal."""

import errno
import glob
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from safetensors import SafetensorError

from fimaq_core.errors import CheckpointError

_LEFT = re.compile(r"\..+\.[0-9a-f]{12}")
_TOO_MANY = errno.EMFILE, errno.ENFILE
_SILENT = errno.EIO, errno.ESTALE, errno.ETIMEDOUT
_DENIED = errno.EACCES, errno.EPERM
#: Reasons for errors that do not come from the content of a file, by error number.
_CAUSES = {
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "its name is too long for this file system",
    errno.ELOOP: "it is a link that leads to itself",
    **dict.fromkeys(_TOO_MANY, "too many files are open: raise the limit (`ulimit -n 4096`)"),
    **dict.fromkeys(_SILENT, "the disk or the network does not answer ({}): check it"),
}
#: Advice for an error of writing, by error number.
_ADVICE = {
    errno.EISDIR: "Remove the folder of that name",
    errno.ENAMETOOLONG: "Choose shorter names",
    **dict.fromkeys(_TOO_MANY, "Raise the limit of open files (`ulimit -n 4096`)"),
    **dict.fromkeys(_SILENT, "Check the disk or the network"),
}


def cause_of(error: OSError, path: Path) -> str:
    """Return why ``path`` cannot be read and what to do about it, without a full stop."""
    if error.errno in _DENIED:
        owner, place, right = "its owner", path, "r"
        with suppress(OSError, KeyError):
            if not os.path.exists(path):  # a folder on the way to it cannot be entered
                place = next(filter(os.path.exists, path.parents))
                right = "rx"
            owner = pwd.getpwuid(place.stat().st_uid).pw_name
        return f"no permission: ask {owner} for it, for example by `chmod a+{right} {place}`"
    text = error.strerror or str(error)
    return _CAUSES.get(error.errno or 0, "{}").format(text)


def is_there(path: Path) -> bool:
    """Return True if something lies at ``path``; links are followed.

    Raises:
        CheckpointError: there is no permission to look, or the disk does not answer.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise CheckpointError(f"Cannot read {path}: {cause_of(error, path)}.") from error
    return True


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of processes that ended while they wrote in ``folder``.

    ``name`` limits this to one file. No other process may be writing these files.
    """
    for file in folder.glob(".*" if name is None else f".{glob.escape(name)}.*"):
        if _LEFT.fullmatch(file.name) and (file.is_symlink() or not file.is_dir()):
            remove(file)


@contextmanager
def replaced_whole(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` when the block ends without an error.

    Args:
        path: the file.
        durable: True to wait until the file is on the disk, so it survives a crash of the machine.

    Raises:
        CheckpointError: the folder is read-only or the disk is full; the old file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)  # the usual permissions
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            os.chmod(temporary, mode)  # a library replaced the file by a private one
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write {path}: {error}. {advice(error, path.parent)}, then run the same "
            "command again: finished results are kept."
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # the error above already tells the user about the folder
                temporary.unlink(missing_ok=True)


def advice(error: Exception, folder: Path) -> str:
    """Return what to do about an error of writing in ``folder``."""
    code = getattr(error, "errno", None)
    if code is None and (found := re.search(r"os error (\d+)", str(error))):  # of safetensors
        code = int(found[1])
    if code not in _DENIED:
        return _ADVICE.get(code or 0, "Free space or make the folder writable")
    with suppress(OSError, KeyError):
        owner = pwd.getpwuid(folder.stat().st_uid).pw_name
        return f"Ask {owner} for permission, for example by `chmod g+rwx {folder}`"
    return "Ask the owner of the folder for permission"


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists (another process may have removed it).

    Raises:
        CheckpointError: the folder is read-only.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(
            f"Cannot remove {path}: {error.strerror}. {advice(error, path.parent)}, then run again."
        ) from error


def open_regular(path: Path, most_bytes: int) -> BufferedReader:
    """Open a regular file for reading.

    A pipe or a device is refused at once: reading one may wait or go on for ever.

    Args:
        path: the file.
        most_bytes: bound on its size, so that reading it fits into memory.

    Raises:
        OSError: the file cannot be opened, is not regular or is larger.
    """

    def opened_without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = open(path, "rb", opener=opened_without_waiting)  # noqa: SIM115
    except ValueError as error:  # a NUL character in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    found = os.fstat(file.fileno())
    problem = ""
    if not stat.S_ISREG(found.st_mode):
        problem = "it is a pipe or a device instead of a regular file"
    elif found.st_size > most_bytes:
        problem = f"it has {found.st_size:,} bytes; at most {most_bytes:,} are read"
    if problem:
        file.close()
        raise OSError(errno.EINVAL, problem, str(path))
    return file
