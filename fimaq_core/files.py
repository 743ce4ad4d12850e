"""Writing of files that appear complete or not at all; removal of files."""

import errno
import glob
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from fimaq_core.errors import CheckpointError

_LEFT = re.compile(r"\..+\.[0-9a-f]{12}")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of processes that ended while they wrote in ``folder``.

    ``name`` limits this to one file. No other process may be writing these files.
    """
    for file in folder.glob(".*" if name is None else f".{glob.escape(name)}.*"):
        if _LEFT.fullmatch(file.name):
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
        temporary.touch(exist_ok=False)  # has the usual permissions, unlike tempfile's files
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write {path}: {error}. Free space or make the folder writable, then run the "
            "same command again: finished results are kept."
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # the error above already tells the user about the folder
                temporary.unlink(missing_ok=True)


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
            f"Cannot remove {path}: {error.strerror}. Make the folder writable, then run again."
        ) from error


def open_regular(path: Path, most_bytes: int) -> BinaryIO:
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
