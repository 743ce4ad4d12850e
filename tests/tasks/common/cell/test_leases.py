"""Leases with real processes: one holder at a time, whatever is killed, asleep or elsewhere."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from filelock import SoftFileLease

from fimaq_core.errors import CheckpointError
from fimaq_core.progress import Progress
from tasks.common.cell import lease
from tasks.common.cell.lease import Busy, LeaseLost, Observer, acquire, awaited, this_process

pytestmark = pytest.mark.slow

#: Holds the lease of its argument, says so, and waits to be ended.
HOLD = """
import sys, time
from pathlib import Path
from tasks.common.cell.lease import acquire
with acquire(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

#: Adds 1 to a number in a file a few times: read, pause, write. Two at a time would lose some.
ADD = """
import sys, time
from pathlib import Path
from tasks.common.cell.lease import awaited
path, alone, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for _ in range(rounds):
    with awaited(path):
        alone.open("x").close()
        number = int(path.read_text()) if path.is_file() else 0
        time.sleep(0.002)
        path.write_text(str(number + 1))
        alone.unlink()
"""

#: Forks while it holds the lease; the child tries to write and to give the lease back, and ends.
FORK = """
import os, sys
from pathlib import Path
from tasks.common.cell.lease import Busy, LeaseLost, acquire
path = Path(sys.argv[1])
with acquire(path) as lease:
    child = os.fork()
    if child == 0:
        try:
            lease.check()
        except LeaseLost:
            print("lost", flush=True)
        lease.release()
        try:
            acquire(path)
        except Busy as busy:
            print(busy.holder == f"process {os.getppid()} on {os.uname().nodename}", flush=True)
        with acquire(path.with_name("own")) as own:
            own.check()
        sys.exit()
    print(os.waitpid(child, 0)[1])
    lease.check()
    print(sorted(os.listdir(path.parent)))
"""

#: Sleeps while it holds the lease, and wants to write as soon as it wakes.
SLEEP = """
import os, signal, sys
from pathlib import Path
from tasks.common.cell.lease import LeaseLost, acquire
with acquire(Path(sys.argv[1])) as lease:
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        lease.check()
    except LeaseLost:
        print("lost", flush=True)
"""

#: Takes a lease where no byte can be written to a file, as on a full disk.
FULL = """
import resource, signal, sys
from pathlib import Path
from fimaq_core.errors import CheckpointError
from tasks.common.cell.lease import acquire
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    acquire(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
"""


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def said(code: str, *arguments: object) -> str:
    process = start(code, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return output


def held_elsewhere(path: Path, code: str = HOLD) -> "subprocess.Popen[str]":
    process = start(code, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def file_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lease")


def from_another_machine(path: Path, **changes: object) -> Path:
    """Write a lease as a process of another machine leaves it."""
    with SoftFileLease(path.with_name("pattern"), lease_duration=lease.EXPIRY) as pattern:
        text = Path(pattern.lock_file).read_text()
    fields = dict(line.split("=") for line in text.splitlines()[1:])
    fields |= {"host": "node7", "token": "t", **changes}
    lines = ["filelock/2", *(f"{name}={value}" for name, value in fields.items())]
    file_of(path).write_text("\n".join([*lines, ""]))
    return file_of(path)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY", 0.3)
    monkeypatch.setattr(lease, "BEAT", 0.02)


def test_a_lease_is_for_one_and_given_back(tmp_path: Path):
    path = tmp_path / "cell" / "result.json"
    assert Observer().holder(path) is None
    with acquire(path) as own:
        own.check()
        assert Observer().holder(path) == f"process {os.getpid()} on {this_process()[0]}"
        with pytest.raises(Busy, match=f"is being made by process {os.getpid()}"):
            acquire(path)
        # Other files are none of its business.
        with acquire(path.with_name("result.json2")), acquire(path.with_name("other")):
            own.check()
    assert Observer().holder(path) is None
    with acquire(path):
        assert names(path.parent) == {".result.json.lease"}
    assert names(path.parent) == set()


def test_a_lease_is_given_back_when_its_work_fails(tmp_path: Path):
    def fail() -> None:
        with acquire(tmp_path / "x"):
            raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        fail()
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("impatient")
def test_a_living_process_keeps_its_lease_and_a_killed_one_loses_it_at_once(tmp_path: Path):
    path = tmp_path / "x"
    process = held_elsewhere(path)
    try:
        os.kill(process.pid, signal.SIGSTOP)  # asleep is not dead, however long
        observer = Observer()
        for _ in range(4):
            assert observer.holder(path) == f"process {process.pid} on {this_process()[0]}"
            time.sleep(0.1)
        with pytest.raises(Busy, match=f"process {process.pid}"):
            acquire(path)
        os.kill(process.pid, signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        began = time.monotonic()
        with acquire(path) as own:  # a zombie is dead
            assert time.monotonic() - began < 0.3
            own.check()
    finally:
        end(process)
    assert names(tmp_path) == set()


def test_a_dead_process_is_no_holder(tmp_path: Path):
    end(held_elsewhere(tmp_path / "x"))
    assert names(tmp_path) == {".x.lease"}
    assert Observer().holder(tmp_path / "x") is None


def test_what_an_id_says_of_a_process(tmp_path: Path):
    def runs(**changes: object) -> bool | None:
        from_another_machine(tmp_path / "x", **changes)
        found = lease._look(tmp_path / "x")
        assert found is not None
        return found.runs()

    with acquire(tmp_path / "y") as own:
        owner = own.lock.owner
    assert owner is not None
    assert owner.start is not None
    here, minute = {"host": owner.hostname}, 60 * os.sysconf("SC_CLK_TCK")
    assert runs(**here) is True
    assert runs(**here, start=owner.start - minute) is False  # its id is used again
    assert runs(**here, pid=2**22 + 1) is False  # beyond the largest id
    assert runs(**here, start=owner.start + 2**64) is None  # a machine of the same name
    assert runs(host="elsewhere") is None


@pytest.mark.usefixtures("impatient")
def test_a_lease_of_another_machine_lapses_without_a_sign_of_life(tmp_path: Path):
    path = tmp_path / "x"
    os.utime(from_another_machine(path), (0, 0))  # its clock may be anywhere
    observer = Observer()
    assert observer.holder(path) == f"process {os.getpid()} on node7"
    began = time.monotonic()
    with acquire(path) as own:
        assert time.monotonic() - began >= 0.3
        own.check()
        assert observer.holder(path) == f"process {os.getpid()} on {this_process()[0]}"
    assert observer.holder(path) is None
    assert names(tmp_path) == set()


def test_a_lease_of_another_machine_that_is_touched_is_held(tmp_path: Path):
    path = tmp_path / "x"
    file = from_another_machine(path)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.02):
            os.utime(file)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(Busy, match="on node7"):
            acquire(path)
    finally:
        stop.set()
        thread.join()


def bytes_of(content: bytes, file: Path) -> None:
    file.write_bytes(content)


LONG_NUMBER = b"""filelock/2
pid=1
host=a
mode=lease
token=t
duration=1e+300
start=%b
""" % (b"9" * 900)

HOSTILE = {
    "nothing": partial(bytes_of, b""),
    "half": partial(bytes_of, b"filelock/2\npid="),
    "zeros": partial(bytes_of, b"\x00" * 50),
    "no UTF-8": partial(bytes_of, b"\xff\xfe" * 50),
    "long": partial(bytes_of, b"1" * 10_000_000),
    "long number": partial(bytes_of, LONG_NUMBER),
    "large id": partial(bytes_of, b"filelock/2\npid=" + b"9" * 30 + b"\nhost=a\nmode=exclusive\n"),
    "large number of seconds": partial(bytes_of, LONG_NUMBER.replace(b"1e+300", b"9" * 900)),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_lease_that_cannot_be_read_counts_until_it_lapses(tmp_path: Path, kind: str):
    path = tmp_path / "x"
    HOSTILE[kind](file_of(path))
    who = "process 1 on a" if kind == "long number" else "an unknown process"
    assert Observer().holder(path) == who
    with acquire(path) as own:
        own.check()
        assert names(tmp_path) == {".x.lease"}


def listening(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(file.relative_to(Path.cwd())))  # a longer path would not fit


NO_FILES = {
    "dangling link": lambda file: file.symlink_to("nowhere"),
    "link to itself": lambda file: file.symlink_to(file.name),
    "link to a device": lambda file: file.symlink_to("/dev/zero"),
    "link to a folder": lambda file: file.symlink_to("."),
    "pipe": os.mkfifo,
    "socket": listening,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_no_lease(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Nobody waits for it: all processes hold leases by files."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    NO_FILES[kind](file_of(path))
    assert Observer().holder(path) is None
    with acquire(path) as own:
        own.check()
        assert names(tmp_path) == {".x.lease"}
        assert file_of(path).is_file()
        assert not file_of(path).is_symlink()


def test_a_folder_in_the_place_of_a_lease_is_the_users(tmp_path: Path):
    (file_of(tmp_path / "x") / "kept").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"\.x\.lease.*Remove the folder of that name"):
        acquire(tmp_path / "x")
    assert (file_of(tmp_path / "x") / "kept").is_dir()


def test_names_of_machines_are_printable(tmp_path: Path):
    content = LONG_NUMBER.replace(b"host=a", b"host=\x1b[2J\xe2\x80\xae" + b"h" * 500)
    file_of(tmp_path / "x").write_bytes(content)
    holder = Observer().holder(tmp_path / "x")
    assert holder is not None
    assert holder.isprintable()
    assert len(holder) < 100


def test_who_was_taken_for_dead_must_not_write(tmp_path: Path):
    path = tmp_path / "x"
    own = acquire(path)
    file_of(path).unlink()
    with pytest.raises(LeaseLost, match="Nothing is written"):
        own.check()
    file = from_another_machine(path)
    with pytest.raises(LeaseLost, match="Nothing is written"):
        own.check()
    own.release()
    assert names(tmp_path) == {file.name}
    assert Observer().holder(path) == f"process {os.getpid()} on node7"  # it is as it was


@pytest.mark.usefixtures("impatient")
def test_who_slept_on_another_machine_finds_out_when_it_wakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "x"
    monkeypatch.setattr(lease, "_machine", lambda: ("elsewhere", 1))
    sleeper = held_elsewhere(path, SLEEP)
    with acquire(path) as own:
        os.kill(sleeper.pid, signal.SIGCONT)
        assert sleeper.communicate(timeout=300)[0] == "lost\n"
        own.check()
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("impatient")
def test_the_heart_beats(tmp_path: Path):
    with acquire(tmp_path / "x"):
        seen = set()
        deadline = time.monotonic() + 300
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(file_of(tmp_path / "x").stat().st_mtime_ns)
            time.sleep(0.01)
    assert len(seen) == 3


def test_a_check_is_a_sign_of_life(tmp_path: Path):
    with acquire(tmp_path / "x") as own:
        os.utime(file_of(tmp_path / "x"), (0, 0))
        own.check()
        assert file_of(tmp_path / "x").stat().st_mtime > 0


@pytest.mark.usefixtures("impatient")
def test_who_died_while_it_removed_a_lease_is_in_nobodys_way(tmp_path: Path):
    path = tmp_path / "x"
    from_another_machine(path)
    from_another_machine(file_of(path))
    with acquire(path) as own:
        own.check()
    assert names(tmp_path) == set()


def test_a_lease_is_removed_only_as_it_was_found(tmp_path: Path):
    """A slow process found the lease of a dead one, whose successor is at work by now."""
    path = tmp_path / "x"
    from_another_machine(path)
    found = lease._look(path)
    assert found is not None
    file_of(path).unlink()
    with acquire(path) as own:
        lease._remove(path, found)
        own.check()


@pytest.mark.usefixtures("impatient")
def test_a_folder_in_place_of_a_lease_is_one_message(tmp_path: Path):
    file_of(tmp_path / "x").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        acquire(tmp_path / "x")


def test_many_processes_take_turns_although_some_are_killed(tmp_path: Path):
    path, alone = tmp_path / "number", tmp_path / "alone"
    for _ in range(2):
        end(held_elsewhere(path))
    victim = held_elsewhere(path)
    processes = [start(ADD, path, alone, 15) for _ in range(4)]
    time.sleep(1)  # all of them wait, and find it dead at the same time
    end(victim)
    for process in processes:
        assert process.wait(timeout=300) == 0
        assert process.stdout is not None
        process.stdout.close()
    assert path.read_text() == "60"
    assert names(tmp_path) == {"number"}


def test_a_forked_process_has_no_part_in_the_lease(tmp_path: Path):
    assert said(FORK, tmp_path / "x").splitlines() == ["lost", "True", "0", "['.x.lease']"]
    assert names(tmp_path) == set()


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path):
    text = said(FULL, tmp_path / "x")
    assert text.startswith(f"Cannot read or write in {tmp_path}: ")
    assert "Free space" in text
    assert names(tmp_path) == set()


def test_what_is_made_elsewhere_is_waited_for_and_not_made_again(tmp_path: Path):
    path = tmp_path / "x"
    own = acquire(path)
    told: list[Progress] = []

    def finish() -> None:
        while not told:
            time.sleep(0.01)
        path.write_text("made")
        own.release()

    thread = threading.Thread(target=finish)
    thread.start()
    with awaited(path, told.append) as next_one:
        assert next_one.waited
        assert path.read_text() == "made"
    thread.join()
    assert told[0].stage == f"wait for process {os.getpid()} on {this_process()[0]}"


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Cannot read or write in .*file/cell: .*writable"):
        acquire(tmp_path / "file" / "cell" / "x")


def test_busy_travels_between_processes():
    busy = Busy(Path("a"), "process 1 on b")
    again = pickle.loads(pickle.dumps(busy))  # noqa: S301 (its own)
    assert (again.path, again.holder, str(again)) == (busy.path, busy.holder, str(busy))
