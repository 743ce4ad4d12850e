"""Ends of a command's process: streams, signals, memory, exceptions, exit codes."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fimaq_core.terminal import printable

#: A module with commands that end in each way.
COMMANDS = r'''
import logging, os, sys, time
import click
from fimaq_core.errors import FimaqError
from tasks.common.cli import process

@click.group(cls=process.Commands)
@process.verbose
def group(): pass

@group.command()
@click.argument("kind")
def fail(kind):
    """Raise an exception of a kind."""
    if kind == "user":
        raise FimaqError("the model \x1b[2J is missing")
    if kind == "memory":
        raise MemoryError
    if kind == "thread":
        raise RuntimeError("can't start new thread")
    if kind == "library":
        try:
            raise ImportError("libx.so: failed to map segment from shared object")
        except ImportError as error:
            raise ImportError("numpy cannot be imported, and here is much advice") from error
    if kind == "fork":
        raise OSError(12, "Cannot allocate memory")
    if kind == "disk":
        raise OSError(28, "No space left on device", "/data/x")
    if kind == "bug":
        raise ValueError("a\nb\x1b[2J")
    if kind == "warning":
        logging.getLogger("benchmarks").warning("this cell is left out\x07")
    if kind == "exit":
        click.get_current_context().exit(1)

@group.command()
def say():
    """Print more text than a buffer takes, also what ASCII lacks, and an escape sequence."""
    for _ in range(20000):
        print("45.40 ± 56.57 \x1b[2J")
    click.echo("± \x1b[2J")
    print("done", file=sys.stderr)

@group.command()
def wait():
    """Wait for a signal."""
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up")
'''
RUN = "from tasks.common.cli.process import start; start('ends:group', prog_name='ends')"


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts one of the commands in a process."""
    (tmp_path / "ends.py").write_text(COMMANDS)
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def start(*arguments: str, env: dict[str, str] | None = None, **settings: Any) -> Any:
        line = [sys.executable, "-c", RUN, *arguments]
        return subprocess.Popen(
            line, env=environment | (env or {}), text=True, **{**pipes, **settings}
        )

    return start


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("user", 2, r"error: the model \x1b[2J is missing"),
        ("memory", 2, "error: Not enough memory (MemoryError)."),
        ("thread", 2, "error: Not enough memory (RuntimeError: can't start new thread)."),
        ("library", 2, "error: Not enough memory (ImportError: libx.so: failed to map"),
        ("fork", 2, "error: Not enough memory (OSError: [Errno 12]"),
        ("disk", 2, "error: No space left on device: /data/x. Check the path"),
        ("bug", 2, r"error: Unexpected error, ValueError: a b\x1b[2J. Give --verbose"),
        ("warning", 0, r"this cell is left out\x07"),
        ("exit", 1, ""),
        ("nothing", 0, ""),
    ],
)
def test_each_end_has_one_line_and_an_exit_code(
    command: Callable[..., Any], kind: str, code: int, words: str
) -> None:
    process = command("fail", kind)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, ""), err
    assert err.startswith(words)
    assert err.count("\n") == bool(words)


def test_verbose_shows_the_details(command: Callable[..., Any]) -> None:
    _, err = command("--verbose", "fail", "bug").communicate()
    assert "Traceback" in err
    assert "\x1b" not in err


def test_a_command_that_cannot_be_imported_ends_with_a_line(tmp_path: Path) -> None:
    code = "from tasks.common.cli.process import start; start('no_such_module:group')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unexpected error, ModuleNotFoundError")
    assert done.stderr.count("\n") == 1


def test_a_small_address_space_is_said_before_libraries_fail(command: Callable[..., Any]) -> None:
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (2**28, 2**28))
    process = command("say", preexec_fn=limit)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: Not enough memory (MemoryError: its address space is limited to")


def test_closed_streams_get_no_output_and_no_file_gets_it(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    def close() -> None:
        for number in range(3):
            os.close(number)

    process = command("say", preexec_fn=close, stdout=None, stderr=None)
    assert process.wait() == 0


def test_the_reader_may_go(command: Callable[..., Any]) -> None:
    process = command("say")
    process.stdout.close()
    assert process.stderr.read() == "done\n"
    assert process.wait() == 0


def test_output_that_cannot_be_written_is_an_error(command: Callable[..., Any]) -> None:
    with open("/dev/full", "w") as full:
        process = command("say", stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("done\nerror: The output cannot be written: No space left on device.")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_takes_the_output(command: Callable[..., Any], encoding: str) -> None:
    process = command("say", env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "done\n")
    sign = "?" if encoding == "ascii" else "±"
    assert out.startswith(f"45.40 {sign} 56.57 \\x1b[2J\n")
    assert out.endswith(f"{sign} \\x1b[2J\n")
    assert printable(out) == out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt_a_command(command: Callable[..., Any], number: int) -> None:
    process = command("wait", preexec_fn=partial(signal.signal, number, signal.SIG_DFL))
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "cleaned up\n")
    assert err.startswith("\nInterrupted. Finished cells are kept")


def test_a_command_under_nohup_goes_on_after_a_hangup(command: Callable[..., Any]) -> None:
    process = command("wait", preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
