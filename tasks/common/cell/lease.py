"""Leases: only one process, on any machine, works on a file at a time.

The lease of a file is `.<name>.lease` beside it. The library filelock creates a lease exclusively,
writes the holder into it, touches it every few seconds and removes it at the end.

This module decides when the lease of a dead process is over. filelock alone counts zombies as
alive, takes leases from local processes that only sleep, confuses machines of the same name, and
cannot take over a lease on file systems that do not swap two names in one step (NFS).
"""

import contextlib
import os
import platform
import socket
import stat
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
from filelock import LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

from fimaq_core.errors import CheckpointError, FimaqError
from fimaq_core.files import advice
from fimaq_core.progress import OnProgress, Progress, silent

#: Seconds between two touches of a lease.
BEAT = 10.0
#: Seconds without a touch until a holder on another machine counts as dead.
EXPIRY = 90.0


class Busy(FimaqError):
    """Another process, `holder`, works on the file `path`."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(path, holder)  # so that the error can be pickled
        self.path, self.holder = path, holder

    def __str__(self) -> str:
        advice = "wait for it, or stop it and run the same command again"
        return f"{self.path} is being made by {self.holder}: {advice}."


class LeaseLost(FimaqError):
    """Another process took this one for dead and may work on the file now."""


def this_process() -> tuple[str, int, float]:
    """Return the machine, id and start time (s) of this process."""
    return platform.node() or "this machine", os.getpid(), psutil.Process().create_time()


def is_running(pid: int, started: float) -> bool:
    """Return True if the process of this id and start time (s) runs here and is no zombie."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 5  # the system may correct its clock
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@cache
def _machine() -> tuple[str, int]:
    """Return the name and the boot id of this machine in filelock's form; Linux only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return "", 0  # no lease has this name, so all holders count as remote
    suffix = f"?pidns-{space:x}" if space != 0xEFFFFFFC else ""  # empty in the first namespace
    return socket.gethostname() + suffix, int(boot.replace("-", ""), 16)


class _Found(NamedTuple):
    """State of a lease at one moment; its holder changes `touched` (ns) every few seconds."""

    owner: OwnerRecord | None
    inode: int
    touched: int
    is_file: bool  # False for a pipe, a link or a folder, which no process takes as a lease

    def __str__(self) -> str:
        if self.owner is None:
            return "an unknown process"
        host = self.owner.hostname.partition("?")[0][:64]  # any user of the folder may write it
        host = "".join(letter if letter.isprintable() else "\ufffd" for letter in host)
        return f"process {self.owner.pid} on {host}"

    def runs(self) -> bool | None:
        """Return True if the holder runs, None if unknown, as for a holder on another machine."""
        boot, ticks = divmod((self.owner and self.owner.start) or 0, 2**64)
        if self.owner is None or (self.owner.hostname, boot) != _machine():
            return None
        return is_running(self.owner.pid, psutil.boot_time() + ticks / os.sysconf("SC_CLK_TCK"))


def _file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lease")


def _look(path: Path) -> _Found | None:
    """Return the present state of the lease of `path`; None without a lease."""
    # Network file systems refresh the time of a file that is read.
    owner = SoftFileLease(_file(path)).owner
    try:
        state = os.lstat(_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _Found(owner, state.st_ino, state.st_mtime_ns, stat.S_ISREG(state.st_mode))


class Observer:
    """Tells who holds a lease. It remembers earlier states to notice leases without touches."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[_Found, float]] = {}

    def holder(self, path: Path) -> str | None:
        """Return the holder of the lease of `path`; None if there is no lease or it is over."""
        try:
            found = _look(path)
        except OSError as error:
            return f"a process whose lease cannot be read ({error.strerror})"
        return None if found is None or self.is_over(path, found) else str(found)

    def is_over(self, path: Path, found: _Found) -> bool:
        """Return True if the holder ended, or this observer saw no touch for `EXPIRY` seconds."""
        if not found.is_file:
            return True
        if (runs := found.runs()) is not None:
            return not runs  # a local process may sleep as long as it likes
        seen, since = self._seen.get(path, (None, 0.0))
        if seen != found:
            since = time.monotonic()
        self._seen[path] = found, since
        return time.monotonic() - since >= EXPIRY


@dataclass
class Lease(contextlib.AbstractContextManager["Lease"]):
    """Lease of `path` that this process holds; a `with` block gives it back at its end."""

    path: Path
    lock: SoftFileLease
    waited: bool = False  # True if another process held it before

    def check(self) -> None:
        """Raise LeaseLost if the lease is lost; to be called just before writing."""
        with contextlib.suppress(OSError):  # a touch keeps others from taking over now
            os.utime(self.lock.lock_file)
        if (owner := self.lock.owner) is None or owner.token != self.lock.token:
            raise LeaseLost(
                f"The lease of {self.path} is lost: this process was silent for too long, or the "
                "folder cannot be read. Nothing is written here. Run the same command again."
            )

    def release(self) -> None:
        """Give the lease back if it is still held."""
        with contextlib.suppress(OSError):
            self.lock.release()

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(path: Path) -> Lease:
    """Take the lease of `path`, which need not exist; create its folder.

    The caller checks afterwards if `path` exists, because another process may just have made it. A
    holder on another machine is watched until it touches its lease, or until `EXPIRY` seconds are
    over. Raises Busy if a living process holds the lease, and CheckpointError if the folder cannot
    be read or written.
    """
    observer = Observer()
    first: _Found | None = None
    times = {"lease_duration": EXPIRY, "heartbeat_interval": BEAT}
    lock = SoftFileLease(_file(path), **times, thread_local=False, blocking=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if (found := _look(path)) is None:
                with contextlib.suppress(Timeout, LeaseSettingsMismatch):  # another was faster
                    lock.acquire()
                    return Lease(path, lock)
            elif observer.is_over(path, found):
                _remove(path, found)
            elif found.runs() or found != (first := first or found):
                raise Busy(path, str(found))
            else:
                time.sleep(0.1)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read or write in {path.parent}: {error}. {advice(error, path.parent)}, then "
            "run the same command again: finished work is kept."
        ) from error


def _remove(path: Path, found: _Found) -> None:
    """Remove a lease that is over. One process at a time does so, so that no new lease is lost."""
    try:
        with acquire(_file(path)):
            if _look(path) == found:
                _file(path).unlink(missing_ok=True)
    except Busy as busy:
        raise Busy(path, busy.holder) from None


def awaited(path: Path, on_progress: OnProgress = silent) -> Lease:
    """Wait until no other process holds the lease of `path`; take it. Raises CheckpointError."""
    waited = False
    while True:
        try:
            return replace(acquire(path), waited=waited)
        except Busy as busy:
            waited = True
            on_progress(Progress(f"wait for {busy.holder}", 0, 1))
            time.sleep(0.5)
