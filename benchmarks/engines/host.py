"""The process that starts those of cells: ``python -m benchmarks.engines.host``, started by its owner (see ``owner.py``).

It imports the heavy libraries once and forks a process for every cell, which takes some ten milliseconds where importing them
takes seconds; still, a crash or a leak ends with its cell. Where forking is not safe (elsewhere than on Linux, and once CUDA is
in use) it measures one cell in itself and ends.
"""

import contextlib
import gc
import importlib
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from benchmarks.engines.base import Job
from benchmarks.engines.child import measure, serve

_FORKS = sys.platform == "linux"


@dataclass(frozen=True)
class Ended:
    """The process of a cell has ended, with this exit code, or minus the signal that killed it."""

    code: int


class Host:
    """Takes cells from its owner, one after the other."""

    def __init__(self, connection: Connection, temporary: Path) -> None:
        """Make a host.

        Args:
            connection: to the owner; the host ends when it does.
            temporary: the folder that is made for a cell's temporary files, and removed with all that is left in it. It lies in
                one that is the owner's.
        """
        self._owner, self._temporary = connection, temporary
        self._threads: int | None = None

    def run(self) -> None:
        """Measure what the owner sends until there is no owner; its folder goes then, in case it was killed."""
        try:
            self._serve()
        finally:
            self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self._temporary.parent, ignore_errors=True)

    def _serve(self) -> None:
        while True:
            try:
                job: Job = pickle.loads(self._owner.recv_bytes())  # noqa: S301 (written by our own driver)
            except (EOFError, OSError):
                return
            self._prepare(job)
            if not job.work:
                continue
            print(f"== {job.label}", flush=True)
            if not _FORKS or cuda_is_up():
                self._measure_here(job.work)
                return
            try:
                self._measure(job.work)
            except OSError:  # the owner is gone
                return

    def _prepare(self, job: Job) -> None:
        """Import what the cell needs. What fails is left to the cell, which tries again and reports it.

        Nothing may run in parallel here: pools of threads do not survive the fork, and who uses them then waits for ever.
        """
        before = len(sys.modules)
        for name in job.imports:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 see above
                traceback.print_exc()
            self._calm()
        if job.work:
            try:
                pickle.loads(job.work)  # noqa: S301 (written by our own driver)
            except Exception:  # noqa: BLE001 see above
                traceback.print_exc()
            self._calm()
        if len(sys.modules) > before:
            # What is here to stay is no garbage: looking through it would copy its pages into every child.
            gc.collect()
            gc.freeze()

    def _calm(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and self._threads is None and hasattr(torch, "set_num_threads"):
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)

    def _measure_here(self, work: bytes) -> None:
        """Be the process of the cell."""

        def hold() -> None:
            wait([self._owner])  # it says nothing more: it is gone
            self._clear()
            os._exit(1)

        threading.Thread(target=hold, daemon=True).start()
        if self._threads is not None:
            sys.modules["torch"].set_num_threads(self._threads)
        self._temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(self._temporary)
        self._owner.send(measure(work, self._owner))

    def _measure(self, work: bytes) -> None:
        """Fork, pass on what the child says, and tell how it ended. Raises OSError where the owner is gone."""
        read, write = os.pipe()
        lifeline, hold = os.pipe()
        bell, ring = socket.socketpair()
        ring.setblocking(False)
        host = os.getpid()
        signal.signal(signal.SIGCHLD, lambda *_: None)  # ends the wait below, by the bell
        signal.set_wakeup_fd(ring.fileno())
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                bell.close()
                ring.close()
                self._owner.close()
                os.close(read)
                os.close(hold)
                serve(work, Connection(write, readable=False), lifeline, host, self._threads, self._temporary)
                code = 0
            except BaseException:  # noqa: BLE001 whatever it is, this process must not go on as a second host
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        os.close(write)
        os.close(lifeline)
        try:
            with Connection(read, writable=False) as messages:
                self._listen(child, messages, bell)
        finally:
            signal.set_wakeup_fd(-1)
            bell.close()
            ring.close()
            os.close(hold)
            code = _end(child)
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._owner.send(Ended(code))

    def _listen(self, child: int, messages: Connection, bell: socket.socket) -> None:
        """Pass on what the child says until it has ended. Its pipe may stay open beyond that: what it started has it too."""
        sources: list[Connection | socket.socket] = [self._owner, bell, messages]
        while True:
            ready = wait(sources)
            if messages in ready:
                try:
                    self._owner.send_bytes(messages.recv_bytes())
                except EOFError:
                    sources.remove(messages)
            if self._owner in ready:  # it says nothing while a cell is measured: it is gone
                raise ConnectionResetError
            if bell in ready and _ended(child, bell):
                os.set_blocking(messages.fileno(), False)
                for content in _rest(messages):
                    self._owner.send_bytes(content)
                return


def cuda_is_up(open_files: Path = Path("/proc/self/fd")) -> bool:
    """Whether this process has called CUDA's driver, which does not work any more after a fork.

    Asking NVML which GPUs there are, as PyTorch does here, is no such call; some libraries make one when they are imported.

    Args:
        open_files: folder of links to what is open. The driver opens the device for unified memory, and nothing else does.
    """
    for link in open_files.iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("/dev/nvidia-uvm"):
                return True
    return False


def _ended(child: int, bell: socket.socket) -> bool:
    bell.recv(64)
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _rest(messages: Connection) -> Iterator[bytes]:
    """What is left in the pipe of a process that has ended; the last message may have been torn."""
    with contextlib.suppress(EOFError, OSError):
        while messages.poll():
            yield messages.recv_bytes()


def _end(child: int) -> int:
    """End the process of a cell, if it has not, and what it started; return its exit code."""
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    # Before its number is free again. Politely: what keeps track of shared memory cleans up when it is alone.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGTERM)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Serve the owner whose connection is the file descriptor in the first argument; the second names a folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; only the driver decides what it means
    Host(Connection(int(sys.argv[1])), Path(sys.argv[2])).run()


if __name__ == "__main__":
    # Not this module's own: what it sends must be known by its name elsewhere.
    from benchmarks.engines.host import main as serve_owner

    serve_owner()
