"""Folder of the code that ``torch.compile`` makes: the user's own, closed to all others.

PyTorch keeps the code in ``$TMPDIR/torchinductor_<user>``. On a shared machine another user can
make this folder first, and fill it with code that PyTorch would run.
"""

import functools
import hashlib
import logging
import os
import platform
import stat
import tempfile
from pathlib import Path

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
#: Beginning of the name of PyTorch's own folder; PyTorch sets the variable to it when imported.
_PYTORCHS = "torchinductor_"


def use_own_cache() -> None:
    """Let ``torch.compile`` of this process and of its children use a folder of the user alone.

    The folder is ``$XDG_CACHE_HOME/fimaq``, by default ``~/.cache/fimaq``. A folder that the user
    gives by ``TORCHINDUCTOR_CACHE_DIR`` has priority. If the folder cannot be made, or others could
    write it, a temporary folder of this process takes its place, and a warning says so.
    """
    given = os.environ.get(_VARIABLE, "")
    if not given or Path(given).name.startswith(_PYTORCHS):
        os.environ[_VARIABLE] = str(_folder(os.environ.get("XDG_CACHE_HOME", "")))


@functools.cache
def _folder(caches: str) -> Path:
    caches = caches if os.path.isabs(caches) else os.path.expanduser("~/.cache")
    # Homes may be shared by machines, and compiled code is for one kind of processor.
    folder = Path(caches, "fimaq", f"kernels-{_processor()}")
    problem = _problem(folder)
    if problem is None:
        return folder
    message = (
        "warning: compiled code is not kept, since %s: set XDG_CACHE_HOME or %s to a folder of "
        "your own."
    )
    logging.getLogger(__name__).warning(message, problem, _VARIABLE)
    return Path(_temporary().name)


@functools.cache
def _temporary() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="fimaq-kernels-", ignore_cleanup_errors=True)


def _problem(folder: Path) -> str | None:
    """Make the folder, closed to others; return why others could write it, or None."""
    if not folder.is_absolute():
        return "you have no home folder"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        top = folder.parents[1].stat()
        if top.st_mode & stat.S_IWOTH and not top.st_mode & stat.S_ISVTX:
            return f"everyone may write in {folder.parents[1]}"
        for place in (folder.parent, folder):
            if {place.lstat().st_uid, place.stat().st_uid} != {os.getuid()}:
                return f"{place} belongs to another user"
            place.chmod(0o700)
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    return None


def _processor() -> str:
    """Return a short digest of the processor and of the limit to its instructions."""
    kind = platform.machine() + os.environ.get("ATEN_CPU_CAPABILITY", "")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    facts = dict.fromkeys(line for line in lines if line.startswith(("model name", "flags")))
    return hashlib.sha256("\n".join([kind, *facts]).encode()).hexdigest()[:12]
