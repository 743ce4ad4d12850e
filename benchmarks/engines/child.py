"""The process of one cell: it measures, tells its host over a pipe, and ends."""

import contextlib
import ctypes
import errno
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.engines.base import Failed, Finished, Kind
from fimaq_core.errors import FimaqError
from fimaq_core.files import replaced_whole
from fimaq_core.progress import Progress, Report

#: Seconds between two progress messages of the same stage and block.
_QUIET = 0.25

#: What PyTorch, CUDA and its libraries say, in small letters, where they have no exception of its own for it.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory", "alloc_failed")


def measure(work: bytes, connection: Connection) -> Finished | Failed:
    """Measure the cell in ``work`` (of :class:`~benchmarks.engines.base.Job`); progress goes to ``connection``.

    The traceback of an error goes to stderr and to the cell's error log, which a cell that is measured loses.
    """
    error_log: Path | None = None
    start = time.monotonic()
    try:
        run_cell, request, error_log = pickle.loads(work)  # noqa: S301 (written by our own driver)
        path = run_cell(request, _reporter(connection))
        if error_log is not None:
            error_log.unlink(missing_ok=True)
        return Finished(Path(path), time.monotonic() - start)
    except Exception as error:  # noqa: BLE001 a failing cell must not end the others; its traceback is kept
        kind, text = _kind(error), traceback.format_exc()
        message = str(error) if isinstance(error, FimaqError) else f"{type(error).__name__}: {error}"
    if kind == "busy":  # nothing went wrong
        return Failed(kind, message)
    print(text, file=sys.stderr, flush=True)
    if error_log is not None:
        try:
            with replaced_whole(error_log) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except FimaqError:
            error_log = None
    return Failed(kind, message, error_log)


def _kind(error: Exception) -> Kind:
    from tasks.common.lease import Busy, LeaseLost

    if isinstance(error, Busy):
        return "busy"
    if isinstance(error, LeaseLost):  # the next attempt finds out who has it
        return "error"
    if isinstance(error, FimaqError):
        return "user"
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return "memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
        return "memory"
    return "error"


def _reporter(connection: Connection) -> Report:
    last: tuple[str, str, bool] | None = None
    sent = 0.0

    def report(progress: Progress) -> None:
        nonlocal last, sent
        now, place = time.monotonic(), (progress.stage, progress.block, progress.loss is not None)
        if place != last or now - sent >= _QUIET:
            last, sent = place, now
            try:
                connection.send(progress)
            except OSError as error:
                raise SystemExit(0) from error  # the host is gone

    return report


def serve(work: bytes, connection: Connection, lifeline: int, host: int, threads: int | None, temporary: Path) -> None:
    """Be the process of a cell, from the fork on.

    Args:
        work: the cell.
        connection: to the host.
        lifeline: end of a pipe that closes when the host is gone.
        host: its process id.
        threads: of PyTorch, which the host turned down to one; None if it is not loaded.
        temporary: folder for temporary files; the host removes it.
    """
    os.setpgid(0, 0)  # so that the host can end what a cell leaves behind
    _die_with_parent(host)
    threading.Thread(target=_hold, args=(lifeline,), daemon=True).start()
    # Compiled kernels are worth keeping: they stay where they would be.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _kernels())
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(temporary)
    if threads is not None:
        sys.modules["torch"].set_num_threads(threads)
    outcome = measure(work, connection)
    with contextlib.suppress(OSError):  # the host is gone
        connection.send(outcome)


def _kernels() -> str:
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")


def _hold(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written
    os._exit(1)


def _die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies: also while it holds the interpreter's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before that
            os._exit(1)
