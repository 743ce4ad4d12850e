"""Errors that users can act on: one message and exit code 2, for all commands."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from benchmarks.commands import NotReady
from fimaq_core.errors import FimaqError


@contextmanager
def user_errors(context: click.Context, broken_off: str) -> Iterator[None]:
    """Turn such an error into one line on stderr and exit code 2; a command that is broken off exits with 130.

    Args:
        context: of the command.
        broken_off: what is kept then.
    """
    try:
        yield
        return
    except NotReady as error:
        click.echo(str(error), err=True)
    except FimaqError as error:
        click.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        click.echo(f"\nBroken off. {broken_off}", err=True)
        context.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (such as `| head`); Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    context.exit(2)
