"""Worker processes: each measures one cell after the other, and tells its parent over a pipe.

A process and a pipe of its own for each worker (not a shared pool): if one dies, exactly the cell it worked on has
failed, and nobody else's queue is damaged.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from fimaq_core.errors import FimaqError
from fimaq_core.files import replaced_whole
from fimaq_core.progress import Progress, Report
from tasks.common.request import CellRequest

RunCell = Callable[[CellRequest, Report], Path]

#: Seconds between two progress messages of the same stage and block.
_QUIET = 0.25

#: Read by numerical libraries when they are first imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Finished:
    """A cell is measured: its record, and how long it took."""

    path: Path
    seconds: float


@dataclass(frozen=True)
class Failed:
    """A cell could not be measured."""

    message: str
    log: Path | None = None


Message = Progress | Finished | Failed


class Worker:
    """A process that measures cells, as its parent sees it."""

    def __init__(self, number: int, threads: int | None, log: Path) -> None:
        self._number, self._threads, self._log = number, threads, log
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: a cell may use data-loading processes, which daemons must not have.
        self._process = context.Process(
            target=_serve, args=(theirs, self._threads, self._log), name=f"worker-{self._number}", daemon=False
        )
        self._process.start()
        theirs.close()  # so that the pipe ends when the worker does

    def assign(self, run_cell: RunCell, request: CellRequest, error_log: Path | None) -> None:
        """Start on a cell. Messages arrive on ``connection``: progress, then one Finished or Failed."""
        with contextlib.suppress(OSError):  # it died while idle: the next receive says so
            self.connection.send_bytes(pickle.dumps((run_cell, request, error_log)))

    def receive(self) -> Message:
        """Return the next message; a worker that died is one that failed, and is replaced."""
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            self.stop()
            self._start()
            return Failed(f"its process died ({_exit_reason(code)})", self._log)
        return message

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self._process.terminate()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _exit_reason(code: int | None) -> str:
    if code is None:
        return "no exit code"
    if code == -signal.SIGKILL:
        return "killed by the system, most often for lack of memory: try fewer jobs"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(connection: Connection, threads: int | None, log: Path) -> None:
    # A terminal sends Ctrl-C to every process; only the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threads is not None:
        for variable in _THREAD_VARIABLES:
            os.environ[variable] = str(threads)
    _redirect_output(log)
    while True:
        try:
            content = connection.recv_bytes()
        except (EOFError, OSError):
            return
        outcome = _measure(content, connection)
        try:
            connection.send(outcome)
        except OSError:
            return


def _redirect_output(log: Path) -> None:
    """Send what libraries print into a file: it would tear the progress display, but helps after a crash."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _measure(content: bytes, connection: Connection) -> Finished | Failed:
    error_log: Path | None = None
    start = time.monotonic()
    try:
        # Unpickled only here: this imports the heavy libraries, which read the thread variables.
        run_cell, request, error_log = pickle.loads(content)  # noqa: S301 (written by our own parent)
        path = run_cell(request, _reporter(connection))
        if error_log is not None:
            error_log.unlink(missing_ok=True)
        return Finished(Path(path), time.monotonic() - start)
    except FimaqError as error:
        message, text = str(error), traceback.format_exc()
    except Exception as error:  # noqa: BLE001 a failing cell must not end the others; its traceback is kept
        message, text = f"{type(error).__name__}: {error}", traceback.format_exc()
    print(text, file=sys.stderr, flush=True)
    if error_log is not None:
        try:
            with replaced_whole(error_log) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except FimaqError:
            error_log = None
    return Failed(message, error_log)


def _reporter(connection: Connection) -> Report:
    last: tuple[str, str] | None = None
    sent = 0.0

    def report(progress: Progress) -> None:
        nonlocal last, sent
        now, place = time.monotonic(), (progress.stage, progress.block)
        if place != last or now - sent >= _QUIET:
            last, sent = place, now
            try:
                connection.send(progress)
            except OSError as error:
                raise SystemExit(0) from error  # the parent is gone

    return report
