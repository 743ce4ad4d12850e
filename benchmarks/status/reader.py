"""Reads the state files of the runners on a results folder. Their content is not trusted."""

import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from benchmarks.status.state import RunnerFacts, State

#: Seconds without a heartbeat after which a runner on another machine is taken to be over.
SILENCE = 30.0

#: State files of runners that are over which are kept, and seconds after which half-written ones are left by something that died.
_KEPT, _HALF_WRITTEN = 5, 3600.0

#: Seconds by which the start of a process may seem to move, since systems reckon it from a clock that is adjusted.
_CLOCK = 2.0

#: Bytes that a state file may have: many times what a runner with a thousand cells at work writes.
_LARGEST = 4 << 20


@dataclass(frozen=True)
class Seen:
    """A state file and whether its runner is at work."""

    path: Path
    state: State
    alive: bool


def read_states(folder: Path) -> tuple[list[Seen], list[str]]:
    """Return what the state files in ``folder`` say, the latest runner first, and a line for each that says nothing."""
    found, problems = [], []
    for path in sorted(folder.glob("*.json")):
        if not path.is_file():
            problems.append(f"Skipped {path}: it is no file.")
            continue
        try:
            with path.open("rb") as file:
                content = file.read(_LARGEST + 1)
        except FileNotFoundError:
            continue  # the next runner has just removed it
        except OSError as error:
            problems.append(f"Skipped {path}: {error.strerror}.")
            continue
        if len(content) > _LARGEST:
            problems.append(f"Skipped {path}: it is too large for a state file.")
            continue
        try:
            state = State.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = f"{where}: {first['msg']}" if where else first["msg"]
            problems.append(f"Skipped {path}: it is no state file of this version ({reason}).")
            continue
        found.append(Seen(path, state, alive(state.runner)))
    found.sort(key=lambda seen: (seen.state.runner.started, seen.path.name), reverse=True)
    return found, problems


def alive(runner: RunnerFacts) -> bool:
    """Whether a runner is at work: by its process on this machine, by its heartbeat on another."""
    if runner.finished:
        return False
    if runner.host != socket.gethostname():
        return time.time() - runner.heartbeat < SILENCE
    try:
        process = psutil.Process(runner.pid)
        same = abs(process.create_time() - runner.process_started) < _CLOCK
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return time.time() - runner.heartbeat < SILENCE


def remove_old(folder: Path) -> None:
    """Remove the state files of runners that are over but for the newest few, and what was half-written long ago.

    What cannot be removed or is no state file stays: this is tidying, and done before a run.
    """
    over = [seen.path for seen in read_states(folder)[0] if not seen.alive]
    for path in over[_KEPT:]:
        _remove(path)
    for path in folder.glob(".*.json.*"):
        try:
            forgotten = time.time() - path.stat().st_mtime > _HALF_WRITTEN
        except OSError:
            continue
        if forgotten:
            _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # of another user, or on a disk that is read-only here
