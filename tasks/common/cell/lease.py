"""Leases: of many processes, on many machines, one at a time works on a file.

A lease is a file beside the one it is about, `.<name>.lease`. filelock makes it exclusively, writes
its holder into it, touches it every few seconds and removes it at the end.

Which leases are over is decided here. filelock alone counts zombies as alive, takes leases from
processes of this machine that only sleep, confuses machines of the same name, and takes over
nothing where a file system cannot exchange two names in one step (NFS).
"""

import contextlib
import glob
import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
from filelock import LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

from fimaq_core.errors import CheckpointError, FimaqError
from fimaq_core.progress import OnProgress, Progress, silent

#: Seconds between two touches, and seconds without one after which a holder counts as dead.
BEAT, EXPIRY = 10.0, 90.0


class Busy(FimaqError):
    """Another process works on the file `path`; `holder` says which."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(path, holder)
        self.path, self.holder = path, holder

    def __str__(self) -> str:
        advice = "wait for that, or stop it and run the same command again"
        return f"{self.path} is being made by {self.holder}: {advice}."


class LeaseLost(FimaqError):
    """This process was taken for dead, and another may work on the file."""


def this_process() -> tuple[str, int, float]:
    """Return the machine, id and start time (s) of this process."""
    return platform.node() or "this machine", os.getpid(), psutil.Process().create_time()


def is_running(pid: int, started: float) -> bool:
    """Return True if the process of this id and start time (s) runs here; a zombie does not."""
    try:
        process = psutil.Process(pid)
        other = abs(process.create_time() - started) > 5  # the system may correct it by a little
        return not (other or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@cache
def _machine() -> tuple[str, int]:
    """Return the name and the boot of this machine as filelock writes them; Linux only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return "", 0  # no lease has such a name, so touches tell
    suffix = f"?pidns-{space:x}" if space != 0xEFFFFFFC else ""  # of the first process namespace
    return socket.gethostname() + suffix, int(boot.replace("-", ""), 16)


class _Found(NamedTuple):
    """A lease as it was found. `touched` (ns) changes with every sign of life."""

    owner: OwnerRecord | None
    inode: int
    touched: int

    def __str__(self) -> str:
        if self.owner is None:
            return "an unknown process"
        return f"process {self.owner.pid} on {self.owner.hostname.partition('?')[0]}"

    def runs(self) -> bool | None:
        """Return whether the holder runs; None if only touches tell, as on another machine."""
        boot, ticks = divmod((self.owner and self.owner.start) or 0, 2**64)
        if self.owner is None or (self.owner.hostname, boot) != _machine():
            return None
        return is_running(self.owner.pid, psutil.boot_time() + ticks / os.sysconf("SC_CLK_TCK"))


def _file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lease")


def _look(path: Path) -> _Found | None:
    """Return the lease of `path` as it is now; None if there is none."""
    # The lease is read before its time is asked for: that makes network file systems look.
    owner = SoftFileLease(_file(path)).owner
    try:
        state = os.lstat(_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _Found(owner, state.st_ino, state.st_mtime_ns)


class Observer:
    """Tells who holds leases. It remembers what it saw, and so knows which leases lapsed."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[_Found, float]] = {}

    def holder(self, path: Path) -> str | None:
        """Return who holds the lease of `path`; None if nobody does, as far as was seen by now."""
        try:
            found = _look(path)
        except OSError as error:
            return f"a process whose lease cannot be read ({error.strerror})"
        return None if found is None or self.is_over(path, found) else str(found)

    def is_over(self, path: Path, found: _Found) -> bool:
        """Return True if the holder ended, or was silent for `EXPIRY` seconds of this observer."""
        if (runs := found.runs()) is not None:
            return not runs  # however long it sleeps
        seen, since = self._seen.get(path, (None, 0.0))
        if seen != found:
            since = time.monotonic()
        self._seen[path] = found, since
        return time.monotonic() - since >= EXPIRY


@dataclass
class Lease:
    """Held lease of `path`, given back at the end of a `with` block. `waited`: another held it."""

    path: Path
    lock: SoftFileLease
    waited: bool = False

    def check(self) -> None:
        """Make sure, just before something is written, that the lease is still held.

        Raises:
            LeaseLost: another process took it over, or it cannot be read.
        """
        with contextlib.suppress(OSError):  # touched first: who is about to take it waits again
            os.utime(self.lock.lock_file)
        if (owner := self.lock.owner) is None or owner.token != self.lock.token:
            raise LeaseLost(
                f"The lease of {self.path} is lost: this process was not heard of for too long, or "
                "the folder cannot be read. Nothing is written here. Run the same command again: "
                "what is finished is kept."
            )

    def release(self) -> None:
        """Give the lease back, unless another process took it over."""
        with contextlib.suppress(OSError):
            self.lock.release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(path: Path) -> Lease:
    """Take the lease of `path`. Look at the file afterwards: another may just have made it.

    Args:
        path: a file, which need not be there; its folder is made.

    Raises:
        Busy: a living process holds it. One of another machine is watched until it shows itself.
        CheckpointError: the folder cannot be read or written.
    """
    observer = Observer()
    first: _Found | None = None
    lock = SoftFileLease(
        _file(path),
        lease_duration=EXPIRY,
        heartbeat_interval=BEAT,
        thread_local=False,
        blocking=False,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if (found := _look(path)) is None:
                # Suppressed: another process was faster.
                with contextlib.suppress(Timeout, LeaseSettingsMismatch):
                    lock.acquire()
                    _remove_old(path)
                    return Lease(path, lock)
            elif observer.is_over(path, found):
                _remove(path, found)
            elif found.runs() or found != (first := first or found):
                raise Busy(path, str(found))
            else:
                time.sleep(0.1)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read or write in {path.parent}: {error}. Free space or make it writable, then "
            "run the same command again: what was finished is kept."
        ) from error


def _remove(path: Path, found: _Found) -> None:
    """Remove a lease that is over, one process at a time.

    Otherwise a slow process could remove the lease of the next holder.
    """
    try:
        with acquire(_file(path)):
            if _look(path) == found:
                _file(path).unlink(missing_ok=True)
    except Busy as busy:
        raise Busy(path, busy.holder) from None


def _remove_old(path: Path) -> None:
    """Remove what earlier versions left, which had leases with numbers."""
    for kind in "lease", "free":
        for file in path.parent.glob(f".{glob.escape(path.name)}.{kind}-[0-9]*"):
            with contextlib.suppress(OSError):
                file.unlink()


def awaited(path: Path, on_progress: OnProgress = silent) -> Lease:
    """Take the lease of `path` as soon as nobody else holds it.

    Args:
        path: as of `acquire`.
        on_progress: told about a wait.

    Raises:
        CheckpointError: the folder cannot be read or written.
    """
    waited = False
    while True:
        try:
            lease = acquire(path)
        except Busy as busy:
            waited = True
            on_progress(Progress(f"wait for {busy.holder}", 0, 1))
            time.sleep(0.5)
        else:
            lease.waited = waited
            return lease


@contextlib.contextmanager
def exclusively(path: Path | None, on_progress: OnProgress = silent) -> Iterator[Lease | None]:
    """Hold the lease of `path` while it is made. Arguments and errors as of `awaited`.

    A file that is there is finished and needs no lease; None needs none either.
    """
    if path is None or path.is_file():
        yield None
    else:
        with awaited(path, on_progress) as lease:
            yield lease
