"""Leases with real processes: one holder at a time whatever is killed, put to sleep, or on another machine."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from fimaq_core.errors import CheckpointError
from fimaq_core.progress import Progress
from tasks.common import anew
from tasks.common.lease import Busy, LeaseLost, Observer, Owner, _space, acquire, awaited, exclusively, holder, this_process

pytestmark = pytest.mark.slow

#: Holds the lease of its argument, says so, and waits to be ended.
HOLD = """
import sys, time
from pathlib import Path
from tasks.common.lease import acquire
with acquire(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

#: Adds 1 to a number in a file a few times: read, pause, write. Two at a time would lose some.
ADD = """
import sys, time
from pathlib import Path
from tasks.common.lease import awaited
path, alone, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for _ in range(rounds):
    with awaited(path):
        alone.open("x").close()
        number = int(path.read_text()) if path.is_file() else 0
        time.sleep(0.002)
        path.write_text(str(number + 1))
        alone.unlink()
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment
    )


def held_elsewhere(path: Path) -> subprocess.Popen[str]:
    process = start(HOLD, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def from_another_machine(path: Path, number: int = 1) -> Path:
    """A lease as a process of another machine leaves it."""
    _, pid, started = this_process()
    owner = Owner("node7", "another boot", pid, started, "t")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lease-{number}")
    file.write_text(json.dumps(asdict(owner)))
    return file


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_lease_is_for_one_and_given_back(tmp_path: Path):
    path = tmp_path / "cell" / "result.json"
    assert holder(path) is None
    with acquire(path) as lease:
        lease.check()
        assert holder(path) == f"process {os.getpid()} on {this_process()[0]}"
        with pytest.raises(Busy, match=f"is being made by process {os.getpid()}"):
            acquire(path)
        with acquire(path.with_name("result.json2")), acquire(path.with_name("other")):  # other files are none of its business
            lease.check()
    assert holder(path) is None
    with acquire(path):
        assert ".result.json.lease-2" in names(path.parent)
    assert {name for name in names(path.parent) if name.startswith(".result.json.")} == {".result.json.free-2"}


def test_a_lease_is_given_back_when_its_work_fails(tmp_path: Path):
    def fail() -> None:
        with acquire(tmp_path / "x"):
            raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        fail()
    assert holder(tmp_path / "x") is None


def test_a_living_process_keeps_its_lease_and_a_killed_one_loses_it_at_once(tmp_path: Path):
    path = tmp_path / "x"
    process = held_elsewhere(path)
    try:
        os.kill(process.pid, signal.SIGSTOP)  # asleep is not dead, however long
        with pytest.raises(Busy, match=f"process {process.pid}"):
            acquire(path, expiry=0.0)
    finally:
        end(process)
    with acquire(path) as lease:
        lease.check()
    assert names(tmp_path) == {".x.free-2"}


def test_what_an_id_says_of_a_process(tmp_path: Path):
    host, pid, started = this_process()
    owner = Owner(host, _space(), pid, started, "t")
    assert owner.is_alive() is True
    assert replace(owner, started=started - 60).is_alive() is None  # or the clock was set: its touches tell
    assert replace(owner, space="elsewhere").is_alive() is None
    assert replace(owner, pid=2**22 + 1).is_alive() is False  # beyond the largest id


def test_a_lease_of_another_machine_lapses_without_a_sign_of_life(tmp_path: Path):
    path = tmp_path / "x"
    file = from_another_machine(path)
    os.utime(file, (0, 0))  # its clock may be anywhere
    observer = Observer(expiry=0.3)
    assert observer.holder(path) == f"process {os.getpid()} on node7"
    began = time.monotonic()
    with acquire(path, expiry=0.3):
        assert time.monotonic() - began >= 0.3
        assert observer.holder(path) == f"process {os.getpid()} on {this_process()[0]}"
    assert observer.holder(path) is None


def test_a_lease_of_another_machine_that_is_touched_is_held(tmp_path: Path):
    path = tmp_path / "x"
    file = from_another_machine(path, 4)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.02):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(Busy, match="on node7"):
            acquire(path, expiry=20)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00" * 50])
def test_a_lease_that_cannot_be_read_counts_until_it_lapses(tmp_path: Path, text: str):
    path = tmp_path / "x"
    (tmp_path / ".x.lease-1").write_text(text)
    assert holder(path) == "an unknown process"
    with acquire(path, expiry=0.2):
        assert names(tmp_path) == {".x.lease-2"}


def test_who_was_taken_for_dead_must_not_write(tmp_path: Path):
    path = tmp_path / "x"
    lease = acquire(path, beat=0.02)
    from_another_machine(path, 2)
    with pytest.raises(LeaseLost, match="nothing is written"):
        lease.check()
    time.sleep(0.1)
    lease.release()
    assert holder(path) == f"process {os.getpid()} on node7"  # the other's lease is as it was
    with acquire(tmp_path / "y") as own:
        (tmp_path / ".y.lease-1").unlink()
        with pytest.raises(LeaseLost, match="is not known"):
            own.check()


def test_the_heart_beats(tmp_path: Path):
    with acquire(tmp_path / "x", beat=0.02):
        file = tmp_path / ".x.lease-1"
        seen = set()
        deadline = time.monotonic() + 300
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(file.stat().st_mtime_ns)
            time.sleep(0.01)
    assert len(seen) == 3


def test_a_number_that_is_free_again_is_worth_nothing(tmp_path: Path):
    """A slow process that saw lease 1 would make lease 2, which has come and gone since."""
    from tasks.common.lease import _take

    path = tmp_path / "x"
    for _ in range(3):
        acquire(path).release()
    assert names(tmp_path) == {".x.free-3"}
    assert _take(path, 1, 1.0) is None
    assert _take(path, 2, 1.0) is None
    assert names(tmp_path) == {".x.free-3"}


def test_of_both_kinds_of_a_number_the_free_one_counts(tmp_path: Path):
    """A process that saw lease 1 free is slow to make lease 2, which was made and given back meanwhile."""
    path = tmp_path / "x"
    acquire(path).release()
    acquire(path).release()
    (tmp_path / ".x.lease-2").write_text("")
    assert holder(path) is None
    with acquire(path):
        assert ".x.lease-3" in names(tmp_path)


def test_a_lease_that_cannot_be_read_is_held(tmp_path: Path):
    (tmp_path / ".x.lease-1").mkdir()
    assert holder(tmp_path / "x") == "a process whose lease cannot be read (Is a directory)"
    with pytest.raises(CheckpointError, match="Is a directory"):
        acquire(tmp_path / "x")


def test_many_processes_take_turns_although_some_are_killed(tmp_path: Path):
    path, alone = tmp_path / "number", tmp_path / "alone"
    victims = []
    for _ in range(2):
        victim = held_elsewhere(path)
        victims.append(victim)
        end(victim)
    processes = [start(ADD, path, alone, 15) for _ in range(6)]
    for process in processes:
        assert process.wait(timeout=300) == 0
        assert process.stdout is not None
        process.stdout.close()
    assert path.read_text() == "90"
    assert not alone.exists()


def test_what_is_made_elsewhere_is_waited_for_and_not_made_again(tmp_path: Path):
    path = tmp_path / "x"
    lease = acquire(path)
    told: list[Progress] = []

    def finish() -> None:
        while not told:
            time.sleep(0.01)
        path.write_text("made")
        lease.release()

    thread = threading.Thread(target=finish)
    thread.start()
    with exclusively(path, told.append) as own:
        assert own is not None
        assert own.waited
        assert path.read_text() == "made"
    thread.join()
    assert told[0].stage == f"wait for process {os.getpid()} on {this_process()[0]}"
    with exclusively(path) as own, exclusively(None) as none:  # what is there needs no lease
        assert own is None
        assert none is None


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Cannot read or write in .*file/cell: .*make it writable"):
        acquire(tmp_path / "file" / "cell" / "x")


def test_busy_travels_between_processes():
    busy = Busy(Path("a"), "process 1 on b")
    again = pickle.loads(pickle.dumps(busy))  # noqa: S301 (its own)
    assert (again.path, again.holder, str(again)) == (busy.path, busy.holder, str(busy))


def test_measuring_again_makes_everything_anew_once(tmp_path: Path):
    path = tmp_path / "x"
    cleared: list[str] = []
    path.write_text("old")
    assert anew.is_done(path, "")
    first, second = anew.new_name(), anew.new_name()
    for name in (first, second):
        assert not anew.is_done(path, name)
        for _ in range(2):
            with awaited(path):
                anew.begin(path, name, partial(cleared.append, name))
        assert not anew.is_done(path, name)
        anew.end(path, name)
        assert anew.is_done(path, name)
        assert anew.is_done(path, "")
    assert cleared == [first, second]
    assert not anew.is_done(path, first)
