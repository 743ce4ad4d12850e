"""Files of events, and the command ``status``."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import benchmark_fakes as fakes
import psutil
import pytest
import yaml
from click.testing import CliRunner, Result
from engine_fakes import HANG, until
from rich.console import Console

from benchmarks.cli import cli
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.watch.events import Run, read_runs
from benchmarks.watch.live import Watch
from fimaq_core.progress import Progress

CELLS = expand(fakes.plain_demo(), Filters(), RunOptions())[3:]


def folder_of(results: Path) -> Path:
    return results / "runs" / ".state"


def shown(results: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, ["status", "--results", str(results), *args])


def quiet(results: Path, said: StringIO | None = None) -> Watch:
    return Watch(Console(file=said or StringIO()), folder_of(results), "local")


def file_of(results: Path) -> Path:
    (path,) = folder_of(results).iterdir()
    return path


def state_of(path: Path) -> Run:
    run = Run(path)
    run.read()
    return run


def foreign(host: str = "elsewhere", **changes: object) -> str:
    """Return the first line of the file of another run."""
    now = time.time()
    facts = {
        "kind": "begin",
        "time": now - 600,
        "host": host,
        "pid": 7,
        "process_started": now,
        "over": 1,
        "total": 9,
    }
    return json.dumps({**facts, **changes}) + "\n"


def put(results: Path, name: str, content: str, heard: float = 0.0) -> Path:
    path = folder_of(results) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    os.utime(path, (time.time() - heard,) * 2)
    return path


CLOSE = '{"kind": "close", "time": 1e9}\n'


def test_nothing_ran(tmp_path: Path):
    result = shown(tmp_path)
    assert result.exit_code == 0
    assert "Nothing has run on" in result.output
    assert json.loads(shown(tmp_path, "--json").output)["runners"] == []
    assert not list(tmp_path.iterdir())


def test_a_run_is_seen_from_its_beginning_to_its_end(tmp_path: Path):
    first, second = CELLS[:2]
    watch = quiet(tmp_path)
    watch.tell("begin", over=3, total=10)
    watch.tell("started", first, where="worker 1")
    watch.tell("retried", first, text="lost")
    watch.tell("started", first, where="worker 1")
    watch.tell("started", second, where="worker 2")
    watch.progress(first, Progress("reconstruct", 5, 20, "blocks.1", float("inf")))
    watch.progress(second, Progress("calibrate", 1, 2, loss=0.5))
    watch.tell("tick", left=90.0, cells={first.label: 30.0})
    (runner,) = json.loads(shown(tmp_path, "--json").output)["runners"]
    assert runner["alive"] is True
    assert runner["runner"]["pid"] == os.getpid()
    assert runner["runner"]["engine"] == "local"
    assert runner["counts"] == {"done": 3, "running": 2, "failed": 0, "total": 10}
    assert 80 < runner["left"] <= 90
    mine, other = runner["running"]
    assert (mine["label"], mine["stage"], mine["block"], mine["done"], mine["total"]) == (
        first.label, "reconstruct", "blocks.1", 5, 20
    )  # fmt: skip
    assert (mine["attempts"], mine["loss"], mine["where"]) == (2, None, "worker 1")
    assert 20 < mine["left"] <= 30
    assert (other["loss"], other["left"], other["attempts"]) == (0.5, None, 1)
    assert mine["key"]["method"] == first.method
    text = shown(tmp_path).output
    assert "Running on" in text
    assert f"{first.label} ×2" in text

    watch.tell(
        "ended", first, outcome="failed", text="it broke", log="/logs/error.log", over=4, left=60.0
    )
    watch.tell("ended", second, outcome="elsewhere", text="measured by another", over=5, left=60.0)
    watch.close()
    (runner,) = json.loads(shown(tmp_path, "--json").output)["runners"]
    assert runner["alive"] is False
    assert runner["runner"]["finished"] is True
    assert runner["counts"] == {"done": 4, "running": 0, "failed": 1, "total": 10}
    assert runner["failed"] == [
        {"label": first.label, "message": "it broke", "log": "/logs/error.log"}
    ]
    text = shown(tmp_path).output
    assert "Nothing runs on" in text
    assert "ended" in text
    assert "failed: it broke (details: /logs/error.log)" in text


def test_progress_is_written_once_in_a_while_and_each_end_at_once(tmp_path: Path):
    watch = quiet(tmp_path)
    watch.tell("begin", over=0, total=10)
    watch.tell("started", CELLS[0])
    for step in range(2000):
        watch.progress(CELLS[0], Progress("reconstruct", step, 2000))
    kinds = [json.loads(line)["kind"] for line in file_of(tmp_path).read_text().splitlines()]
    assert kinds[:3] == ["begin", "started", "progress"]
    assert len(kinds) < 200
    watch.tell("ended", CELLS[0], outcome="finished", text="top1 1.0", over=1)
    assert state_of(file_of(tmp_path)).state.done == 1


def test_only_new_lines_are_read(tmp_path: Path):
    """The reader continues where it stopped, also in the middle of a line."""
    path = put(tmp_path, "x.jsonl", foreign())
    known: dict[Path, Run] = {}
    assert read_runs(folder_of(tmp_path), known)[0][0].state.over == 1
    end = '{"kind": "ended", "time": 1e9, "label": "a", "text": "top1 1.0", "over": 2}\n'
    for part in (end[:20], end[20:]):
        with path.open("a") as file:
            file.write(part)
        (run,), problems = read_runs(folder_of(tmp_path), known)
        assert not problems
    assert (run.state.over, [event.label for event in run.state.ended]) == (2, ["a"])


def test_a_file_that_cannot_be_written_costs_the_view_only_and_is_said_once(tmp_path: Path):
    said = StringIO()
    watch = quiet(tmp_path, said)
    watch.tell("begin", over=0, total=3)
    path = file_of(tmp_path)
    path.unlink()
    folder_of(tmp_path).rmdir()
    folder_of(tmp_path).write_text("in the way")
    for number, cell in enumerate(CELLS[:3]):
        watch.tell("started", cell)
        watch.tell("ended", cell, outcome="finished", text="top1 1.0", over=number + 1)
    watch.close()
    assert said.getvalue().count("warning:") == 1
    assert f"Cannot write {path}" in said.getvalue()
    assert "[3/3]" in said.getvalue()


RUN = """
import sys
from benchmarks.cli import cli
import benchmark_fakes
if __name__ == "__main__":
    cli(sys.argv[1:], obj=benchmark_fakes.ADAPTER)
"""


def test_a_killed_run_is_told_from_a_running_one(tmp_path: Path):
    grid = {
        "name": "small",
        "tasks": {"classification": {"dataset": "digit-pairs", "models": ["demo_vit"]}},
        "methods": ["fp", "fimaq"], "bits": ["w3a3"], "seeds": [1], "threads": 1,
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(grid))
    (tmp_path / "faults.json").write_text(json.dumps({"fimaq": "slow"}))
    (tmp_path / "main.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        sys.executable,
        str(tmp_path / "main.py"),
        "run",
        "--profile",
        str(tmp_path / "small.yaml"),
        "--jobs",
        "1",
    ]
    process = subprocess.Popen(
        [*command, "--results", str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:

        def evaluates() -> bool:
            runs, _ = read_runs(folder_of(tmp_path))
            labels = list(runs[0].state.running) if runs else []
            return bool(labels and "fimaq" in labels[0]) and (
                runs[0].state.progress[labels[0]].stage == "evaluate"
            )

        until(evaluates)
        (runner,) = json.loads(shown(tmp_path, "--json").output)["runners"]
        assert runner["alive"] is True
        assert runner["runner"]["pid"] == process.pid
        assert runner["counts"] == {"done": 1, "running": 1, "failed": 0, "total": 2}
        assert [cell["label"] for cell in runner["running"]] == ["demo_vit fimaq w3a3 seed 1"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    # The killed process stays in the process table until its parent waits for it.
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert json.loads(shown(tmp_path, "--json").output)["runners"][0]["alive"] is False
    process.wait()
    assert "it was killed, or its machine does not answer" in shown(tmp_path).output


def test_runs_elsewhere_go_by_their_heartbeat_and_those_here_by_their_process(tmp_path: Path):
    mine = psutil.Process()
    here = {"host": socket.gethostname(), "pid": mine.pid}
    put(tmp_path, "a.jsonl", foreign(), heard=5)
    put(tmp_path, "b.jsonl", foreign(), heard=60)
    put(tmp_path, "c.jsonl", foreign() + CLOSE)
    put(tmp_path, "d.jsonl", foreign(**here, process_started=mine.create_time()), heard=3000)
    put(tmp_path, "e.jsonl", foreign(**here, process_started=mine.create_time() - 500))
    runs, problems = read_runs(folder_of(tmp_path))
    assert not problems
    assert {run.path.name for run in runs if run.is_alive} == {"a.jsonl", "d.jsonl"}
    # The running ones, and the latest other one.
    assert len(json.loads(shown(tmp_path, "--json").output)["runners"]) == 3


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "null", "\x00\x01", '{"schema_version": 2}',
        foreign(pid=-7).strip(),
        foreign().strip().replace('"total": 9', '"total": 1e999'),
        foreign().strip().replace('"total": 9', '"total": ' + "9" * 5000),
        foreign("\ud800").strip(),
        foreign(kind="new").strip(),
        "[" * 100_000,
        " " * (5 << 20),
    ],
    ids=range(12),
)  # fmt: skip
def test_files_that_are_none_are_skipped_with_a_warning(tmp_path: Path, content: str):
    bad = put(tmp_path, "bad.jsonl", content + "\n")
    put(tmp_path, "good.jsonl", foreign())
    result = shown(tmp_path)
    assert result.exit_code == 0, result.output
    assert f"warning: Skipped {bad}" in result.output.replace("\n", "")
    assert "Running on elsewhere" in result.output
    found = json.loads(shown(tmp_path, "--json").output)
    assert len(found["runners"]) == len(found["warnings"]) == 1
    quiet(tmp_path).tell("begin", over=0, total=1)
    assert bad.exists()


def test_torn_lines_unknown_fields_and_files_of_earlier_versions_are_no_error(tmp_path: Path):
    put(tmp_path, "old.json", '{"schema_version": 1, "runner": {}}')
    put(tmp_path, "begins.jsonl", foreign()[:20])
    new = '{"kind": "new", "time": 1}\n{"kind": "tick", "time": 1e9, "more": 1, "left": 7}\n'
    put(tmp_path, "x.jsonl", foreign() + new + '{"kind": "ended", "ti')
    found = json.loads(shown(tmp_path, "--json").output)
    assert found["warnings"] == []
    (runner,) = found["runners"]
    assert runner["left"] == 0
    assert "Running on elsewhere" in shown(tmp_path).output


def test_nothing_in_a_file_reaches_the_terminal_as_more_than_text(tmp_path: Path):
    nasty = "\x1b[2J[bold red]模\u202e\x9b31m\n[/]"
    key = {
        "section": nasty,
        "model": nasty,
        "scope": "",
        "method": "",
        "bits": "",
        "seed": 1,
        "point": "",
    }
    events = [
        {"kind": "started", "label": nasty, "where": nasty, "key": key},
        {"kind": "progress", "label": nasty, "stage": nasty, "block": nasty},
        {
            "kind": "ended",
            "label": "other",
            "outcome": "failed",
            "text": nasty,
            "log": nasty,
            "over": 2,
        },
    ]
    lines = [json.dumps({"time": time.time(), **event}) + "\n" for event in events]
    put(tmp_path, "x.jsonl", foreign(nasty, engine=nasty) + "".join(lines))
    put(tmp_path, "\x1b[31mbad.jsonl", "{\n")
    text = shown(tmp_path).output
    assert text.count("[bold red]模") >= 4
    assert not any(character in text for character in "\x1b\x9b\u202e")
    json_text = shown(tmp_path, "--json").output
    assert json_text.isascii()
    assert "\x1b" not in json_text


def test_old_files_go_with_the_next_run_and_those_of_running_ones_stay(tmp_path: Path):
    for number in range(12):
        put(tmp_path, f"old{number:02d}.jsonl", foreign(time=1e9 + number) + CLOSE)
    put(tmp_path, "running.jsonl", foreign(time=1e9))
    put(tmp_path, "bad.jsonl", "{\n")
    quiet(tmp_path).tell("begin", over=0, total=1)
    names = {path.name for path in folder_of(tmp_path).iterdir()}
    assert len(names) == 8
    assert names > {
        *(f"old{number:02d}.jsonl" for number in range(7, 12)),
        "running.jsonl",
        "bad.jsonl",
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--watch"], "needs a terminal"), (["--watch", "--json"], "leave --watch out")],
)
def test_watch_refuses_json_and_output_without_a_terminal(
    tmp_path: Path, args: list[str], words: str
):
    result = shown(tmp_path, *args)
    assert result.exit_code == 2
    assert words in result.output


def test_watching_goes_on_until_it_is_broken_off(tmp_path: Path):
    import pty
    import select

    put(tmp_path, "x.jsonl", foreign())
    primary, secondary = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TERM": "xterm",
    }
    command = [sys.executable, "-m", "benchmarks", "status", "--watch", "--results", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=secondary, stderr=secondary, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(secondary)
    content, end, drawn = b"", time.monotonic() + HANG, False
    while time.monotonic() < end:
        if not select.select([primary], [], [], 0.5)[0]:
            continue
        try:
            content += os.read(primary, 65536)
        except OSError:  # its other end is closed
            break
        if b"Running on elsewhere" in content and not drawn:
            drawn = True
            process.send_signal(signal.SIGINT)
    os.close(primary)
    assert process.wait(timeout=HANG) == 0, content
    assert drawn
    assert b"Traceback" not in content


def test_what_stays_names_no_machine_and_no_process(tmp_path: Path):
    watch = quiet(tmp_path)
    watch.tell("begin", over=0, total=2)
    watch.tell("started", CELLS[0], where="node-17 cuda:3")
    watch.progress(CELLS[0], Progress("calibrate", 1, 2))
    path, known = file_of(tmp_path), {}
    (before,), _ = read_runs(folder_of(tmp_path), known)
    assert before.is_alive
    assert socket.gethostname().encode() in path.read_bytes()
    size = path.stat().st_size
    watch.close()
    content = path.read_bytes()
    for text in (socket.gethostname(), "node-17", str(os.getpid()), "process_started", '"pid"'):
        assert text.encode() not in content
    assert content[size:].count(b"\n") == 1  # all bytes have kept their place
    (after,), problems = read_runs(folder_of(tmp_path), known)
    assert not problems
    for run in (after, state_of(path)):
        assert (run.is_alive, run.state.is_finished, run.state.total) == (False, True, 2)
    assert "Last run: ended" in shown(tmp_path).output
    assert json.loads(shown(tmp_path, "--json").output)["runners"][0]["runner"]["host"] == ""


def test_the_next_run_blanks_out_a_run_that_was_killed(tmp_path: Path):
    killed = put(tmp_path, "killed.jsonl", foreign(), heard=500)
    living = put(tmp_path, "living.jsonl", foreign("another"))
    nasty = put(tmp_path, "nasty.jsonl", foreign() + "[" * 3000 + "\n{}\n\n", heard=500)
    heard = killed.stat().st_mtime_ns
    quiet(tmp_path).tell("begin", over=0, total=1)
    assert "elsewhere" not in killed.read_text() + nasty.read_text()
    assert killed.stat().st_mtime_ns == heard
    assert "another" in living.read_text()
    assert nasty.read_text().endswith("[" * 3000 + "\n{}\n\n")
    runs, _ = read_runs(folder_of(tmp_path))
    alive = {run.path.name for run in runs if run.is_alive}
    assert {"killed.jsonl", "nasty.jsonl"}.isdisjoint(alive)
    assert "living.jsonl" in alive


def test_what_is_no_file_of_events_is_named(tmp_path: Path):
    folder = folder_of(tmp_path)
    put(tmp_path, "good.jsonl", foreign())
    os.mkfifo(folder / "a.jsonl")
    (folder / "b.jsonl").mkdir()
    (folder / "c.jsonl").symlink_to("/dev/zero")
    (folder / "d.jsonl").symlink_to("nowhere")
    (folder / "e.jsonl").symlink_to("e.jsonl")
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl"))).write_text("x\n")
    with (folder / "f.jsonl").open("wb") as file:
        file.truncate(2**31)  # takes no space
    runs, problems = read_runs(folder)
    assert [run.path.name for run in runs] == ["good.jsonl"]
    told = " ".join(problems)
    assert told.count("a pipe or a device instead of a regular file") == 2
    for text in ("b.jsonl: it is a folder", "e.jsonl: it is a link", "at most 1,073,741,824"):
        assert text in told
    result = shown(tmp_path)
    assert result.exit_code == 0
    assert "Running on elsewhere" in result.output
    watch = quiet(tmp_path)
    watch.tell("begin", over=0, total=1)  # looks through all of them
    watch.close()


def test_a_long_line_is_skipped(tmp_path: Path):
    put(tmp_path, "x.jsonl", foreign() + "x" * (3 * 2**20) + "\n" + CLOSE)
    (run,), _ = read_runs(folder_of(tmp_path))
    assert run.state.is_finished
