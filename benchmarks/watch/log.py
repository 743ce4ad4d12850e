"""The file of a run's events: ``<results>/runs/.state/*.jsonl``, one event a line.

Losing the file costs the view of others, never the run. Its content is not trusted.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
from pydantic import ValidationError

from benchmarks.watch.events import Event, State

#: Seconds between two signs of life, and without any after which a run elsewhere is taken as over.
_BEAT, SILENCE = 1.0, 30.0

#: Seconds between two lines about the same cell: at least so many, and this share of its time so
#: far, so that a file of many days stays small.
_EVERY, _SHARE = 1.0, 0.02

#: Files of runs that are over which are kept.
_KEPT = 5

#: Seconds by which the start of a process may seem to move, since clocks are adjusted.
_CLOCK = 2.0


class EventLog:
    """Writes the events of a run."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """Make a log; the first event makes the file.

        Args:
            folder: of the files of all runs.
            say: tells people, once, if the file cannot be written.
        """
        self.path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self._say = say
        self._times: dict[str, tuple[float, float]] = {}
        self._beat = 0.0
        self._broken = False

    def add(self, event: Event) -> None:
        """Write an event; the many ``progress`` and ``tick`` only once in a while."""
        try:
            if event.kind == "begin":
                self.path.parent.mkdir(parents=True, exist_ok=True)
                remove_old(self.path.parent)
            if self._is_due(event):
                # Opened for each line, so that other machines see it on a network disk.
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{event.model_dump_json(exclude_defaults=True)}\n")
                self._beat = event.time
            elif event.time - self._beat >= _BEAT:
                os.utime(self.path)
                self._beat = event.time
        except OSError as error:
            if not self._broken:
                self._broken = True
                reason = f"Cannot write {self.path}: {error.strerror}."
                what = "`python -m benchmarks status` will not show this run as it is."
                self._say(f"warning: {what} {reason}")

    def _is_due(self, event: Event) -> bool:
        if event.kind not in ("progress", "tick"):
            self._times.pop(event.label, None)
            return True
        first, last = self._times.get(event.label, (event.time, 0.0))
        if event.time - last < max(_EVERY, _SHARE * (event.time - first)):
            return False
        self._times[event.label] = first, event.time
        return True


@dataclass
class Run:
    """A run as its file tells it, and the Unix time of its last sign of life."""

    path: Path
    state: State = field(default_factory=State)
    heartbeat: float = 0.0
    offset: int = 0

    def read(self) -> None:
        """Apply what the file has more by now. A line that is torn or unknown says nothing."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            *lines, _ = file.read().split(b"\n")
            self.heartbeat = os.fstat(file.fileno()).st_mtime
        for line in lines:
            self.offset += len(line) + 1
            with suppress(ValidationError):
                self.state.apply(Event.model_validate_json(line))

    @property
    def is_alive(self) -> bool:
        """True while it goes on: by its process on this machine, by its heartbeat elsewhere."""
        begin = self.state.begin
        if begin is None or self.state.finished:
            return False
        if begin.host == socket.gethostname():
            try:
                process = psutil.Process(begin.pid)
                same = abs(process.create_time() - begin.process_started) < _CLOCK
                return same and process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False
            except psutil.AccessDenied:
                pass
        return time.time() - self.heartbeat < SILENCE


def read_runs(folder: Path, known: dict[Path, Run] | None = None) -> tuple[list[Run], list[str]]:
    """Return the runs, the latest first, and a line for each file that says nothing.

    ``known`` keeps what was read: with the same one, the next call reads only what is new.
    """
    runs, found, problems = {} if known is None else known, [], []
    for path in sorted(folder.glob("*.jsonl")):
        run = runs.setdefault(path, Run(path))
        try:
            run.read()
        except FileNotFoundError:
            continue  # the next run has just removed it
        except OSError as error:
            problems.append(f"Skipped {path}: {error.strerror}.")
            continue
        if run.state.begin is not None:
            found.append((run.state.begin.time, path.name, run))
        elif run.offset:
            problems.append(f"Skipped {path}: it has no events of this version.")
    return [run for *_, run in sorted(found, key=lambda item: item[:2], reverse=True)], problems


def remove_old(folder: Path) -> None:
    """Remove the files of runs that are over but for the newest few; what says nothing stays."""
    over = [run.path for run in read_runs(folder)[0] if not run.is_alive]
    for path in over[_KEPT:]:
        with suppress(OSError):  # of another user, or on a disk that is read-only here
            path.unlink(missing_ok=True)
