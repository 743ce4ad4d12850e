"""The process of a cell: it measures, sends messages to its executor, and ends."""

import contextlib
import ctypes
import errno
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.run.executor import Failed, Finished, Kind, Message, Started
from fimaq_core.errors import FimaqError
from fimaq_core.files import replaced_whole
from fimaq_core.progress import OnProgress, Progress

#: Seconds between two progress messages of the same stage and block.
_QUIET = 0.25

#: Words of PyTorch, CUDA and its libraries where they have no exception of its own for memory.
_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory",
    "alloc_failed",
)  # fmt: skip


def serve(
    label: str, work: bytes, connection: Connection, where: str, log: Path, temporary: Path,
    environment: dict[str, str],
) -> None:  # fmt: skip
    """Be the process of a cell.

    Args:
        label, work: the cell; see `benchmarks.run.executor.Executor`.
        connection: to the executor; this process ends when the other end closes.
        where: name of the place, for people.
        log: takes the output.
        temporary: folder for temporary files, which the executor removes.
        environment: variables of the executor, which may differ from those of the fork server.
    """
    os.setpgid(0, 0)  # the executor ends the whole group, with all that a cell starts
    executor = multiprocessing.parent_process()
    if sys.platform == "linux" and executor is not None and executor.pid != os.getppid():
        # The death of the fork server, which the executor takes for that of the cell, ends it.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_hold, args=(connection, temporary), daemon=True).start()
    redirect(log)
    faulthandler.enable()
    print(f"== {label}", flush=True)
    os.environ.clear()
    os.environ.update(environment)
    if preload := sys.modules.get("benchmarks.run.preload"):
        preload.restore_threads()
    # Compiled kernels are worth keeping: they stay in the usual folder.
    usual = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", usual)
    tempfile.tempdir = str(temporary)
    connection.send(Started(where))
    connection.send(measure(work, connection.send))


def _hold(connection: Connection, temporary: Path) -> None:
    with contextlib.suppress(OSError):
        connection.poll(None)  # nothing is ever sent here: this returns when the executor is gone
    shutil.rmtree(temporary, ignore_errors=True)
    os._exit(1)


def redirect(log: Path) -> None:
    """Append the output of this process to ``log``; drop it if ``log`` cannot be written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    except OSError:
        file = open(os.devnull, "ab")  # noqa: SIM115
    with file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), 1 if stream is sys.stdout else 2)
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)


def measure(work: bytes, send: Callable[[Message], None]) -> Finished | Failed:
    """Measure the cell in ``work``; ``send`` takes its progress.

    The traceback of an error goes to stderr and to the cell's error log.
    """
    error_log: Path | None = None
    start = time.monotonic()
    try:
        run_cell, request, error_log = pickle.loads(work)  # noqa: S301 (written by our own runner)
        path = run_cell(request, _reporter(send))
        if error_log is not None:
            error_log.unlink(missing_ok=True)
        return Finished(Path(path), time.monotonic() - start)
    except Exception as error:  # noqa: BLE001 the cell fails, and no other
        kind, text = _kind(error), traceback.format_exc()
        known = isinstance(error, FimaqError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
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
    from tasks.common.cell.lease import Busy, LeaseLost

    if isinstance(error, Busy):
        return "busy"
    if isinstance(error, FimaqError):
        # The next attempt finds out who has a lost lease.
        return "error" if isinstance(error, LeaseLost) else "user"
    torch = sys.modules.get("torch")
    memory = isinstance(error, MemoryError) or (
        (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _NO_MEMORY))
    )
    return "memory" if memory else "error"


def _reporter(send: Callable[[Message], None]) -> OnProgress:
    last: tuple[str, str, bool] | None = None
    sent = 0.0

    def report(progress: Progress) -> None:
        nonlocal last, sent
        now, place = time.monotonic(), (progress.stage, progress.block, progress.loss is not None)
        if place != last or now - sent >= _QUIET:
            last, sent = place, now
            try:
                send(progress)
            except OSError as error:
                raise SystemExit(0) from error  # the executor is gone

    return report
