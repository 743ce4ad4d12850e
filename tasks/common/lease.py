"""Leases: of many processes, on many machines, one at a time works on a file.

A lease is a small file beside the one it is about: ``.<name>.lease-7`` while it is held, ``.<name>.free-7`` afterwards. The
highest number counts. Taking a lease over means making the next number, exclusively: of several processes that try, one
succeeds, and the number of a held lease never comes back. That needs nothing of a file system but that creating a file
exclusively and renaming are atomic, as they are on NFS since version 3; no clocks are compared and nothing is ever locked.

The holder touches its lease every few seconds. It is taken from a holder that has died: at once where it was a process of this
machine that is gone, else after its lease has not been touched for :data:`EXPIRY` seconds by the clock of who waits. A holder
that was only asleep finds a higher number when it wakes, and must not write: :meth:`Lease.check`.
"""

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from fimaq_core.errors import CheckpointError, FimaqError
from fimaq_core.progress import Progress, Report, silent

#: Seconds between two touches, and without one after which a lease of another machine has lapsed.
BEAT, EXPIRY = 10.0, 90.0

_HELD, _FREE = "lease", "free"


class Busy(FimaqError):
    """Another process works on the file. ``holder`` says which."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is being made by {holder}: wait for that, or stop it and run the same command again.")
        self.path, self.holder = path, holder

    def __reduce__(self) -> tuple[Any, ...]:
        return Busy, (self.path, self.holder)


class LeaseLost(FimaqError):
    """This process was taken for dead, and another works on the file now."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        host: name of its machine, for people.
        space: boot and process namespace: processes with the same one see each other's ids.
        pid: its id.
        started: time of its start, in seconds.
        token: tells its leases apart.
    """

    host: str
    space: str
    pid: int
    started: float
    token: str

    def describe(self) -> str:
        """The process, for people."""
        return f"process {self.pid} on {self.host}"

    def is_alive(self) -> bool | None:
        """Whether it runs; None where that cannot be told by its id: it is elsewhere, or its id may be another's by now."""
        if self.space != _space():
            return None
        if not _has_id(self.pid):
            return False
        # Times of start move with the clock when that is set, so another time does not prove another process.
        return True if is_running(self.pid, self.started) else None


def _has_id(pid: int) -> bool:
    """Whether a process of this machine has the id; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def is_running(pid: int, started: float) -> bool:
    """Whether the process with this id, started at this time (s), still runs on this machine; a zombie does not."""
    try:
        # Start times are counted from a boot time that the system may correct by a little.
        return _has_id(pid) and abs(psutil.Process(pid).create_time() - started) < 5
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def this_process() -> tuple[str, int, float]:
    """Machine, id and start time (s) of this process."""
    return platform.node() or "this machine", os.getpid(), psutil.Process().create_time()


def _space() -> str:
    """What processes that see each other have in common; a word of its own where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {psutil.boot_time():.0f}"


@dataclass(frozen=True)
class _Entry:
    """A lease file as it was found. ``touched`` changes with every sign of life."""

    number: int
    kind: str
    file: Path
    owner: Owner | None = None
    touched: int = 0

    @property
    def who(self) -> str:
        return "an unknown process" if self.owner is None else self.owner.describe()


def _files(path: Path) -> dict[int, tuple[str, Path]]:
    """The lease files of ``path`` by their numbers."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.({_HELD}|{_FREE})-(\d{{1,9}})")
    found: dict[int, tuple[str, Path]] = {}
    try:
        names = os.listdir(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for name in names:
        match = pattern.fullmatch(name)
        # Of both kinds of a number the free one counts: who made the other afterwards was too late.
        if match is not None and found.get(int(match[2]), ("", path))[0] != _FREE:
            found[int(match[2])] = (match[1], path.parent / name)
    return found


def _newest(path: Path) -> _Entry | None:
    """The lease file that counts; None where there is none."""
    while True:
        files = _files(path)
        if not files:
            return None
        number = max(files)
        kind, file = files[number]
        if kind == _FREE:
            return _Entry(number, kind, file)
        try:
            # Opened before it is asked for its time: that makes network file systems look.
            with file.open(encoding="utf-8") as stream:
                text, state = stream.read(10_000), os.fstat(stream.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            time.sleep(0.01)  # given back or taken over just now: a network file system may take a moment to tell
            continue
        return _Entry(number, kind, file, _parsed(text), state.st_mtime_ns)


def _parsed(text: str) -> Owner | None:
    """Who wrote a lease; None where that cannot be read (yet): then only its touches tell whether it is held."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        content = json.loads(text)
        owner = Owner(**{name: kind(content[name]) for name, kind in Owner.__annotations__.items()})
        return owner if set(content) == set(Owner.__annotations__) else None
    return None


class Observer:
    """Tells whether leases are held, and remembers what it saw: that is how it knows that one lapsed."""

    def __init__(self, expiry: float = EXPIRY) -> None:
        """Make an observer; ``expiry`` in seconds."""
        self._expiry = expiry
        self._seen: dict[Path, tuple[int, int, float]] = {}

    def holder(self, path: Path) -> str | None:
        """Who holds the lease of ``path``; None if nobody does, as far as can be seen by now."""
        try:
            entry = _newest(path)
        except OSError as error:
            return f"a process whose lease cannot be read ({error.strerror})"
        return None if entry is None or self._is_over(path, entry) else entry.who

    def _is_over(self, path: Path, entry: _Entry) -> bool:
        if entry.kind == _FREE:
            return True
        alive = None if entry.owner is None else entry.owner.is_alive()
        if alive is not None:
            return not alive  # however long it sleeps
        now = time.monotonic()
        number, touched, since = self._seen.get(path, (0, 0, now))
        if (number, touched) != (entry.number, entry.touched):
            since = now
        self._seen[path] = (entry.number, entry.touched, since)
        return now - since >= self._expiry

    def is_alive(self, path: Path, patience: float = 0.1) -> str | None:
        """Watch a lease until it is clear whether its holder lives; return the holder, or None if the lease is over.

        Args:
            path: the file it is about.
            patience: seconds between two looks.
        """
        first = _newest(path)
        while first is not None:
            entry = _newest(path)
            if entry is None or self._is_over(path, entry):
                return None
            known = entry.owner is not None and entry.owner.is_alive()
            if known or (entry.number, entry.touched) != (first.number, first.touched):
                return entry.who
            time.sleep(patience)
        return None


def holder(path: Path) -> str | None:
    """Who holds the lease of ``path``; None if nobody does. A lease of another machine counts as held, however old."""
    return Observer().holder(path)


class Lease:
    """A lease that is held; see :func:`acquire`. It is given back at the end of a ``with`` block.

    Attributes:
        path: the file it is about.
        waited: whether another held it before.
    """

    waited = False

    def __init__(self, path: Path, number: int, file: Path, beat: float) -> None:
        self.path, self._number, self._file = path, number, file
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat,), name=f"lease {path.name}", daemon=True)
        self._thread.start()

    def _beat(self, beat: float) -> None:
        while not self._stop.wait(beat):
            with contextlib.suppress(OSError):  # whether it is still held is for check to say
                os.utime(self._file)

    def check(self) -> None:
        """Make sure that the lease is still held, just before something is written.

        Raises:
            LeaseLost: another process has taken it over.
        """
        try:
            os.utime(self._file)
            newest = max(_files(self.path), default=0)
        except OSError as error:
            raise LeaseLost(
                f"Whether {self.path} may still be written is not known: {error}. Run the same command again."
            ) from error
        if newest != self._number:
            raise LeaseLost(
                f"This process was not heard of for so long that another works on {self.path} now: nothing is written here. "
                "Run the same command again: what is finished is kept."
            )

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # taken over, or the folder is gone: nothing to give back
            os.rename(self._file, self._file.with_name(f".{self.path.name}.{_FREE}-{self._number}"))

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def acquire(path: Path, expiry: float = EXPIRY, beat: float = BEAT) -> Lease:
    """Take the lease of ``path``. What it is about must be looked at again afterwards: another may just have made it.

    Args:
        path: a file, which need not be there; its folder is made.
        expiry: seconds without a touch after which a lease of another machine has lapsed.
        beat: seconds between two touches.

    Raises:
        Busy: a living process holds it. Of another machine that shows within some seconds, that it died after ``expiry``.
        CheckpointError: the folder cannot be written.
    """
    observer = Observer(expiry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            entry = _newest(path)
            if entry is not None and observer.is_alive(path) is not None:
                raise Busy(path, entry.who)
            lease = _take(path, 0 if entry is None else entry.number, beat)
            if lease is not None:
                return lease
    except OSError as error:
        raise CheckpointError(
            f"Cannot read or write in {path.parent}: {error}. Free space or make it writable, then run the same command again: "
            "what was finished is kept."
        ) from error


def _take(path: Path, number: int, beat: float) -> Lease | None:
    """Make the lease that follows ``number``; None if another did."""
    host, pid, started = this_process()
    owner = Owner(host, _space(), pid, started, secrets.token_hex(8))
    file = path.with_name(f".{path.name}.{_HELD}-{number + 1}")
    if number + 1 in _files(path):
        return None
    try:
        with file.open("x", encoding="utf-8") as stream:
            json.dump(asdict(owner), stream)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        return None
    except OSError:
        file.unlink(missing_ok=True)
        raise
    files = _files(path)
    # Given back or taken over: a number that is free again was removed behind a higher one, and is worth nothing.
    if max(files) != number + 1 or files[number + 1][0] != _HELD:
        file.unlink(missing_ok=True)
        return None
    lease = Lease(path, number + 1, file, beat)
    for lower, (_, old) in files.items():
        if lower <= number:
            old.unlink(missing_ok=True)
    return lease


@contextlib.contextmanager
def exclusively(path: Path | None, report: Report = silent, expiry: float = EXPIRY, beat: float = BEAT) -> Iterator[Lease | None]:
    """Hold the lease of ``path`` while it is made; where another makes it, wait for that.

    A file that is there already is finished, and needs no lease; nor does None. What waited finds it there.

    Args:
        path: the file.
        report: told about a wait.
        expiry, beat: as of :func:`acquire`.
    """
    if path is None or path.is_file():
        yield None
        return
    with awaited(path, report, expiry, beat) as lease:
        yield lease


def awaited(path: Path, report: Report = silent, expiry: float = EXPIRY, beat: float = BEAT) -> Lease:
    """Take the lease of ``path`` as soon as nobody else holds it. Arguments as of :func:`exclusively`."""
    waited = False
    while True:
        try:
            lease = acquire(path, expiry, beat)
        except Busy as busy:
            waited = True
            report(Progress(f"wait for {busy.holder}", 0, 1))
            time.sleep(0.5)
            continue
        lease.waited = waited
        return lease
