"""Cells on this machine."""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.run import preload
from benchmarks.run.child import serve
from benchmarks.run.executor import Executor, Failed, Finished, Message

#: Read by numerical libraries when they are first imported.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def default_jobs(threads: int | None, device: str) -> int:
    """Return how many cells run at a time: what the cores allow on CPU; one on a GPU."""
    if device != "cpu" or threads is None:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // threads)


@dataclass
class _Cell:
    """The process of a cell, its connection and temporary folder, and its last message."""

    process: BaseProcess
    connection: Connection
    temporary: Path
    outcome: Finished | Failed | None = None


class LocalExecutor(Executor):
    """Runs each cell in a new process.

    The processes are forked from one that has the heavy libraries loaded, which takes some ten
    milliseconds instead of seconds. They are spawned where forking is not safe: elsewhere than on
    Linux, and if one of the libraries calls CUDA when it is imported.
    """

    def __init__(
        self, slots: Mapping[str, Path], threads: int | None, imports: Sequence[str] = (), *,
        fork: bool = True,
    ) -> None:  # fmt: skip
        """Make an executor; the first cell starts the fork server.

        Args:
            slots: names of the slots, for people, and the log of the output of each.
            threads: CPU threads of a cell; None leaves the libraries' choice.
            imports: modules that cells need.
            fork: whether processes are forked where that is safe.
        """
        self._logs = dict(slots)
        self._forks = fork and sys.platform == "linux"
        self._environment = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            # Libraries ask for GPUs when they are imported, before the fork.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        if threads is not None:
            self._environment |= dict.fromkeys(_THREADS, str(threads))
        log = next(iter(self._logs.values())).with_name("imports.log")
        self._preload = {preload.VARIABLE: json.dumps([str(log), *imports])}
        forkserver.set_forkserver_preload([preload.__name__])
        self._cells: dict[str, _Cell] = {}
        self._unheard: list[tuple[str, Message]] = []

    def slots(self) -> Sequence[str]:
        return list(self._logs)

    def start(self, slot: str, label: str, work: bytes) -> None:
        environment = {**os.environ, **self._environment}
        try:
            with contextlib.ExitStack() as on_failure:
                temporary = Path(tempfile.mkdtemp(prefix="fimaq-"))
                on_failure.callback(shutil.rmtree, temporary, ignore_errors=True)
                ours, theirs = Pipe()
                on_failure.callback(ours.close)
                log = self._logs[slot]
                arguments = label, work, theirs, slot, log, temporary, environment
                context = get_context("forkserver" if self._forks else "spawn")
                process = context.Process(target=serve, args=arguments)
                with theirs, _inherited(environment | (self._preload if self._forks else {})):
                    process.start()
                on_failure.pop_all()
            self._cells[slot] = _Cell(process, ours, temporary)
        except (OSError, EOFError) as error:
            # CUDA is in use, or the folder of the fork server's socket has a long name or is gone.
            if self._forks:
                why = str(error) or type(error).__name__
                print(
                    f"note: cells start without the fork server, seconds later each ({why})",
                    file=sys.stderr,
                )
                self._forks = False
                self.start(slot, label, work)
                return
            # No memory, files or processes are left: that may pass.
            reason = f"no process can be started: {error or type(error).__name__}"
            self._unheard.append((slot, Failed("error", reason)))

    def wait(self, timeout: float) -> list[tuple[str, Message]]:
        heard, self._unheard = self._unheard, []
        if heard:
            return heard
        sources: dict[Connection | int, str] = {}
        for slot, cell in self._cells.items():
            sources[cell.process.sentinel] = slot
            if not cell.connection.closed:
                sources[cell.connection] = slot
        if not sources:
            time.sleep(timeout)
        ready = wait(list(sources), timeout) if sources else []
        for slot in dict.fromkeys(sources[source] for source in ready):  # type: ignore[index]
            cell = self._cells[slot]
            heard += [(slot, message) for message in self._received(cell)]
            if cell.process.sentinel in ready:
                del self._cells[slot]
                _end(cell)
                reason = f"its process died ({_exit_reason(cell.process.exitcode)})"
                heard.append((slot, cell.outcome or Failed("died", reason, self._logs[slot])))
        return heard

    def _received(self, cell: _Cell) -> Iterator[Message]:
        try:
            while not cell.connection.closed and cell.connection.poll():
                message = cell.connection.recv()
                if isinstance(message, Finished | Failed):
                    cell.outcome = message  # passed on when the process has given back its memory
                else:
                    yield message
        except (EOFError, OSError):
            cell.connection.close()

    def close(self) -> None:
        for cell in self._cells.values():
            _end(cell)
        self._cells.clear()


def _end(cell: _Cell) -> None:
    """End the process of a cell, all that it started, and its temporary files."""
    assert cell.process.pid
    with contextlib.suppress(ProcessLookupError, PermissionError):
        # Politely: what keeps track of shared memory cleans up when it is alone.
        os.killpg(cell.process.pid, signal.SIGTERM)
    cell.process.kill()
    cell.process.join()
    cell.connection.close()
    shutil.rmtree(cell.temporary, ignore_errors=True)


def _exit_reason(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system, most often for lack of memory: try fewer jobs"
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Let the processes that are started in the block have these environment variables."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)
