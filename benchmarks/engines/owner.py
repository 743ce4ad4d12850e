"""A host process as its owner sees it: the local engine, or an actor of the Ray engine."""

import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.engines.base import Failed, Finished, Job, Message
from benchmarks.engines.host import Ended
from fimaq_core.progress import Progress

#: Read by numerical libraries when they are first imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

#: Seconds that a host has to end in when its owner hangs up, before it is killed.
_PATIENCE = 5.0


class Owner:
    """Starts a host, gives it cells, and starts another when it dies."""

    def __init__(self, threads: int | None, log: Path, imports: Sequence[str] = ()) -> None:
        """Make an owner and start its host.

        Args:
            threads: CPU threads of a cell; None leaves the libraries' choice.
            log: file that takes what cells print; earlier content is kept.
            imports: modules that the first cell will need.
        """
        self._threads, self._log = threads, log
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary: Path | None = None
        self._busy = False
        self._outcome: Finished | Failed | None = None
        #: To the host; None while there is none.
        self.connection: Connection | None = None
        self._start(imports)

    def _start(self, imports: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # libraries ask for GPUs when they are imported: before the fork
        if self._threads is not None:
            environment.update(dict.fromkeys(_THREAD_VARIABLES, str(self._threads)))
        self._temporary = Path(tempfile.mkdtemp(prefix="fimaq-"))
        ours, theirs = socket.socketpair()
        with theirs, _opened(self._log) as log:
            command = [sys.executable, "-u", "-X", "faulthandler", "-m", "benchmarks.engines.host"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self._temporary / "cell")],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        if imports:
            self._send(Job(b"", tuple(imports)))

    def _send(self, job: Job) -> None:
        assert self.connection is not None
        with contextlib.suppress(OSError):  # it died while idle: the next receive says so
            self.connection.send_bytes(pickle.dumps(job))

    def assign(self, job: Job) -> None:
        """Start on a cell; :meth:`receive` gives its messages: progress, then one Finished or Failed."""
        if self._process is None or self._process.poll() is not None:
            self._clear()
            self._start(())
        self._busy, self._outcome = True, None
        self._send(job)

    def receive(self) -> Message | None:
        """Return the next message, to be called when ``connection`` can be read; None for nothing of interest."""
        assert self.connection is not None
        try:
            message = pickle.loads(self.connection.recv_bytes())  # noqa: S301 (written by our own processes)
        except (EOFError, OSError):
            return self._bury()
        if isinstance(message, Progress):
            return message
        if not isinstance(message, Ended):
            # Not passed on before the process has ended: its memory is not free before.
            self._outcome = message
            return None
        return self._over(_exit_reason(message.code))

    def _over(self, reason: str) -> Finished | Failed | None:
        """The cell at hand is over: by what it said, else by the death of its process."""
        busy, self._busy = self._busy, False
        return (self._outcome or Failed("died", f"its process died ({reason})", self._log)) if busy else None

    def _bury(self) -> Finished | Failed | None:
        assert self._process is not None
        try:
            code: int | None = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self._clear()
        if code == 0:  # it measures one cell only on this system
            self._start(())
        # Otherwise it is started again for the next cell: one that cannot live must not be started over and over.
        return self._over(_exit_reason(code))

    def hang_up(self) -> None:
        """Let the host end, whatever it does; :meth:`stop` waits for it."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def stop(self) -> None:
        """End the host and the process of its cell."""
        self.hang_up()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_PATIENCE)
        self._clear()

    def _clear(self) -> None:
        self.hang_up()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None


def _exit_reason(code: int | None) -> str:
    if code is None:
        return "no exit code"
    if code == -signal.SIGKILL:
        return "killed by the system, most often for lack of memory: try fewer jobs"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _opened(log: Path):  # type: ignore[no-untyped-def]
    """The log, open to append; nowhere, if it cannot be written: a cell's error log is elsewhere."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    except OSError:
        file = open(os.devnull, "ab")  # noqa: SIM115
    with file:
        yield file
