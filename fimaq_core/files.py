"""Writing files so that they are there whole or not at all, and removing them."""

import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fimaq_core.errors import CheckpointError

_LEFT = re.compile(r"\..+\.[0-9a-f]{12}")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what processes left in ``folder`` that ended while they wrote; of the file ``name`` only, where given.

    For whoever knows that no other process writes these files now.
    """
    for file in folder.glob(".*" if name is None else f".{glob.escape(name)}.*"):
        if _LEFT.fullmatch(file.name):
            remove(file)


@contextmanager
def replaced_whole(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the place of ``path`` when the block ends well.

    Args:
        path: of the file.
        durable: it is on the disk by then, so that it outlives a crash of the machine.

    Raises:
        CheckpointError: the folder is read-only or the disk full; what was there before is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        temporary.touch(exist_ok=False)  # with the usual permissions, where tempfile's are private
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write {path}: {error}. Free space or make the folder writable, then run the same command again: "
            "what was finished is kept."
        ) from error
    finally:
        if temporary is not None:
            with suppress(
                OSError
            ):  # where even that cannot be, what cannot be written is said already
                temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there: another process may have been faster.

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
