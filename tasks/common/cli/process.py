"""The process of a command: its output streams, signals, messages and exit codes.

Exit codes of all commands: 0 done; 1 something failed or differs, as the command's help says; 2
cannot run; 130 stopped by Ctrl-C, SIGTERM or SIGHUP. An unexpected exception ends with 2.
"""

import importlib
import logging
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from fimaq_core.errors import FimaqError, out_of_memory
from fimaq_core.terminal import Guarded, guarded, one_line

_KEPT = (
    "Finished cells are kept, and finished blocks of other cells: the same command, without "
    "--force, continues where it stopped."
)
#: Bytes of address space below which numerical libraries cannot be loaded.
_LEAST = 2**29
_MEMORY = (
    "Not enough memory ({reason}). Give the process more memory (ulimit -v, container, batch "
    "system), or use fewer jobs, threads and smaller batches. Finished results are kept."
)


def show_log(level: int) -> None:
    """Print log messages from ``level`` on, unless ``--verbose`` has chosen a level."""
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def _log(_: click.Context, __: click.Parameter, is_verbose: bool) -> None:
    if is_verbose:
        show_log(logging.INFO)


#: Option ``--verbose``, which each group and command has.
verbose = click.option(
    "--verbose", is_flag=True, expose_value=False, callback=_log, help="Show the log."
)


class Command(click.Command):
    """Command whose exceptions become messages and exit codes, see `reported`."""

    def invoke(self, ctx: click.Context) -> Any:
        ctx.color = True  # otherwise click removes escape sequences, which the streams would show
        with reported():
            return super().invoke(ctx)


class Commands(Command, click.Group):
    """Group of commands whose exceptions become messages and exit codes."""


def start(command: str, arguments: list[str] | None = None, **settings: Any) -> None:
    """Import and run a command; raise SystemExit unless its exit code is 0.

    Nothing but an import of this module may come before, so that every error becomes a message.

    Args:
        command: module and name of the command, such as ``benchmarks.cli:cli``.
        arguments: those of the command line; None: of the process.
        settings: of `click.Command.main`.
    """
    module, _, name = command.partition(":")
    with reported():
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY and limit < _LEAST:  # libraries would end the process
            raise MemoryError(f"its address space is limited to {limit / 1e6:.0f} MB")
        found = getattr(importlib.import_module(module), name)
        run(found, arguments, **settings)


def run(command: click.Command, arguments: list[str] | None = None, **settings: Any) -> None:
    """Run a command; raise SystemExit unless its exit code is 0."""
    with reported():
        if code := command.main(arguments, standalone_mode=False, **settings):
            sys.exit(code)


@contextmanager
def reported() -> Iterator[None]:
    """Turn each exception of the block into one message on stderr and an exit code.

    SIGTERM and SIGHUP interrupt the block like Ctrl-C. The standard streams are guarded, see
    `fimaq_core.terminal`. If the standard output cannot be written, the exit code is 2.
    """
    is_outer = not isinstance(sys.stdout, Guarded)
    with guarded(), _interrupted_by_signals():
        try:
            yield
        except (SystemExit, click.exceptions.Exit):
            raise
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except (KeyboardInterrupt, click.Abort):
            print(f"\nInterrupted. {_KEPT}", file=sys.stderr)
            sys.exit(130)
        except BaseException as error:  # noqa: BLE001 also panics of libraries in Rust
            print(f"error: {message(error)}", file=sys.stderr)
            sys.exit(2)
        finally:
            problem = sys.stdout.problem() if is_outer and isinstance(sys.stdout, Guarded) else None
            if problem is not None:
                text = f"error: The output cannot be written: {problem.strerror}."
                print(f"{text} Free space, then repeat the command.", file=sys.stderr)
                sys.exit(2)


def message(error: BaseException) -> str:
    """Return the message of an exception that ends a command.

    The log has the traceback of an unexpected exception; ``--verbose`` shows the log.
    """
    if isinstance(error, FimaqError):
        return str(error)
    logging.getLogger(__name__).info("The command ended with an exception", exc_info=error)
    if (cause := out_of_memory(error)) is not None:
        return _MEMORY.format(reason=_reason(cause, 200))
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}. Check the path, its permissions and its disk."
    text = f"Unexpected error, {_reason(error, 1000)}. Give --verbose before the command's name"
    return f"{text} to see the details, and report them if the cause is not clear."


def _reason(error: BaseException, most: int) -> str:
    return one_line(f"{type(error).__name__}: {error}".removesuffix(": "), most)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C; leave a signal that is ignored (nohup).

    Schedulers send SIGTERM shortly before the time limit, and terminals SIGHUP when they close.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread gets signals
        yield
        return
    before = {
        number: handler
        for number in (signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }

    def stop(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the end
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
