"""Executor of cells on this machine."""

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

from benchmarks.run import child
from benchmarks.run.executor import Executor, Failed, Finished, Message

#: Variables that numerical libraries read when they are imported.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def default_jobs(threads: int | None, device: str) -> int:
    """Return the number of cells at a time: one on a GPU; cores / `threads` on a CPU."""
    if device != "cpu" or threads is None:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // threads)


@dataclass
class _CellProcess:
    """Process of a cell, with its connection, temporary folder and last message."""

    process: BaseProcess
    connection: Connection
    temporary: Path
    last: Finished | Failed | None = None

    def received(self) -> Iterator[Message]:
        """Yield new messages. The last one of the cell stays in `last` until the process ends."""
        try:
            while not self.connection.closed and self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, Finished | Failed):
                    self.last = message
                else:
                    yield message
        except (EOFError, OSError):
            self.connection.close()

    def end(self) -> None:
        """Kill the process and all that it started, and remove its temporary files."""
        assert self.process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # SIGTERM lets the resource tracker of multiprocessing remove shared memory.
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


class LocalExecutor(Executor):
    """Runs each cell in a new process.

    A fork server, which has imported the large libraries, makes a process in milliseconds.
    Otherwise the process is spawned, which takes seconds: on systems other than Linux, if an import
    uses CUDA (a fork is not safe then), or if `fork` is False.
    """

    def __init__(
        self, slots: Mapping[str, Path], threads: int | None, imports: Sequence[str] = (), *,
        fork: bool = True,
    ) -> None:  # fmt: skip
        """Make an executor with the log file of each slot.

        `threads` is the number of CPU threads of a cell; None keeps the default of the libraries.
        The fork server loads the modules `imports`.
        """
        self._logs = dict(slots)
        self._forks = fork and sys.platform == "linux"
        self._environment = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            # Libraries count GPUs when they are imported. Counting must not start CUDA.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        if threads is not None:
            self._environment |= dict.fromkeys(_THREADS, str(threads))
        log = next(iter(self._logs.values())).with_name("imports.log")
        self._preload = {child.PRELOAD: json.dumps([str(log), *imports])}
        forkserver.set_forkserver_preload([child.__name__])
        self._cells: dict[str, _CellProcess] = {}
        self._failed_starts: list[tuple[str, Message]] = []

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
                args = label, work, theirs, slot, self._logs[slot], temporary, environment
                context = get_context("forkserver" if self._forks else "spawn")
                process = context.Process(target=child.serve, args=args)
                with theirs, _variables(environment | (self._preload if self._forks else {})):
                    process.start()
                on_failure.pop_all()
            self._cells[slot] = _CellProcess(process, ours, temporary)
        except (OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
            if self._forks:  # an import uses CUDA, or the path of the socket is too long
                note = "note: no fork server, so each cell takes some seconds more to start"
                print(f"{note} ({reason})", file=sys.stderr)
                self._forks = False
                self.start(slot, label, work)
            else:
                failure = Failed("error", f"no process can be started: {reason}")
                self._failed_starts.append((slot, failure))

    def wait(self, timeout: float) -> list[tuple[str, Message]]:
        messages, self._failed_starts = self._failed_starts, []
        if messages:
            return messages
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
            messages += [(slot, message) for message in cell.received()]
            if cell.process.sentinel in ready:
                del self._cells[slot]
                cell.end()
                reason = f"its process died ({_exit_reason(cell.process.exitcode)})"
                messages.append((slot, cell.last or Failed("died", reason, self._logs[slot])))
        return messages

    def close(self) -> None:
        for cell in self._cells.values():
            cell.end()
        self._cells.clear()


def _exit_reason(code: int | None) -> str:
    """Return why a process with this exit code ended."""
    if code == -signal.SIGKILL:
        return "killed by the system, most often for lack of memory: try fewer jobs"
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that the block starts."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)
