"""The process of one cell, and the fork server that makes these processes.

The fork server imports this module, which then imports the modules that cells need. Threads do not
survive a fork, so PyTorch uses one thread in the fork server.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
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
from fimaq_core.compile_cache import use_own_cache
from fimaq_core.documents import parse_json
from fimaq_core.errors import FimaqError, out_of_memory
from fimaq_core.files import replaced_whole
from fimaq_core.progress import OnProgress, Progress
from fimaq_core.terminal import guard

#: Environment variable of the fork server: a JSON list of its log file and of modules to import.
PRELOAD = "FIMAQ_PRELOAD"

#: Seconds between two progress messages of the same stage and block.
_QUIET = 0.25

#: Number of threads that PyTorch chose in the fork server; None in other processes.
_threads: int | None = None


def serve(
    label: str, work: bytes, connection: Connection, where: str, log: Path, temporary: Path,
    environment: dict[str, str],
) -> None:  # fmt: skip
    """Run one cell in this process, which ends when the executor closes `connection`.

    `label` and `work`: see `Executor.start`. `where` is the name of the slot. The output goes to
    the file `log`, and temporary files to the folder `temporary`, which the executor removes.
    `environment` becomes the environment of this process.
    """
    os.setpgid(0, 0)  # the executor kills this group, which includes all processes of the cell
    executor = multiprocessing.parent_process()
    if sys.platform == "linux" and executor is not None and executor.pid != os.getppid():
        # The executor reports a cell as dead when the fork server dies, so the cell must die too.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=_end_with, args=(connection, temporary), daemon=True).start()
    redirect(log)
    faulthandler.enable()
    print(f"== {label}", flush=True)
    os.environ.clear()
    os.environ.update(environment)
    if _threads is not None:
        asked = os.environ.get("OMP_NUM_THREADS", "")
        sys.modules["torch"].set_num_threads(int(asked) if asked.isdecimal() else _threads)
    use_own_cache()
    tempfile.tempdir = str(temporary)
    connection.send(Started(where))
    connection.send(measure(work, connection.send))


def _end_with(connection: Connection, temporary: Path) -> None:
    """End this process when the executor, which sends nothing, has closed its connection."""
    with contextlib.suppress(OSError):
        connection.poll(None)
    shutil.rmtree(temporary, ignore_errors=True)
    os._exit(1)


def redirect(log: Path) -> None:
    """Append the output of this process to `log`; drop the output if `log` is not writable."""
    guard()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    except OSError:
        file = open(os.devnull, "ab")  # noqa: SIM115
    with file:
        for number, stream in enumerate((sys.stdout, sys.stderr), 1):
            stream.flush()
            os.dup2(file.fileno(), number)
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)


def measure(work: bytes, send: Callable[[Message], None]) -> Finished | Failed:
    """Measure the cell in `work` and send its progress. Return the last message of the cell.

    The traceback of an error goes to stderr and to the error log of the cell.
    """
    error_log: Path | None = None
    start = time.monotonic()
    try:
        run_cell, request, error_log = pickle.loads(work)  # noqa: S301 (written by our own runner)
        path = run_cell(request, _on_progress(send))
        if error_log is not None:
            error_log.unlink(missing_ok=True)
        return Finished(Path(path), time.monotonic() - start)
    except Exception as error:  # noqa: BLE001 the other cells go on
        kind, text = _kind(error), traceback.format_exc()
        is_known = isinstance(error, FimaqError)
        message = str(error) if is_known else f"{type(error).__name__}: {error}"
    if kind == "busy":
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
    """Return the cause of a failure; see `executor.Kind`."""
    from tasks.common.cell.lease import Busy, LeaseLost

    if isinstance(error, Busy):
        return "busy"
    if isinstance(error, FimaqError):
        return "error" if isinstance(error, LeaseLost) else "user"
    return "memory" if out_of_memory(error) else "error"


def _on_progress(send: Callable[[Message], None]) -> OnProgress:
    """Return a callback that sends progress, at most every `_QUIET` seconds in the same place."""
    last: tuple[str, str, bool] | None = None
    sent = 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal last, sent
        place = (progress.stage, progress.block, progress.loss is not None)
        if place == last and time.monotonic() - sent < _QUIET:
            return
        last, sent = place, time.monotonic()
        try:
            send(progress)
        except OSError as error:
            raise SystemExit(0) from error  # the executor has ended

    return on_progress


def uses_cuda(open_files: Path = Path("/proc/self/fd")) -> bool:
    """Return True if this process uses the CUDA driver, which does not work after a fork.

    The driver opens the device of unified memory, which is then a link in `open_files`. Counting
    GPUs through NVML does not open this device.
    """
    for link in open_files.iterdir() if open_files.is_dir() else ():
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("/dev/nvidia-uvm"):
                return True
    return False


def _preload(log: str, *modules: str) -> None:
    """Import `modules` in the fork server, whose output goes to `log`."""
    global _threads
    redirect(Path(log))
    use_own_cache()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 the cell imports the module again and reports the error
            traceback.print_exc()
        torch = sys.modules.get("torch")
        if torch is not None and _threads is None and hasattr(torch, "set_num_threads"):
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
    if uses_cuda():
        sys.exit("An import uses CUDA, so processes are spawned, not forked.")
    # Otherwise the garbage collector writes to imported objects, so each cell gets its own copy.
    gc.collect()
    gc.freeze()


if PRELOAD in os.environ:
    _preload(*parse_json(os.environ.pop(PRELOAD), PRELOAD, FimaqError))
