"""Errors for users. The message says what is wrong and what to do."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class FimaqError(Exception):
    """Base of errors for the user; the commands print the message and exit with code 2."""


class RecipeError(FimaqError):
    """A recipe, method or setting is unknown or does not make sense."""


class ModelError(FimaqError):
    """A model or its weights are missing, do not fit or are not supported."""


class DataError(FimaqError):
    """Data are missing, damaged or do not fit the model."""


class CheckpointError(FimaqError):
    """A checkpoint or record is damaged, belongs to another run or cannot be written."""


class EngineError(FimaqError):
    """A step engine or cell executor cannot run on this machine."""


class NumericsError(FimaqError):
    """Weights, activations or a loss are NaN or infinite."""


#: Parts of messages about memory that ran out, for exceptions whose class does not tell.
_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory",
    "alloc_failed", "can't start new thread", "failed to map segment", "bad_alloc",
)  # fmt: skip


def out_of_memory(error: BaseException) -> BaseException | None:
    """Return the exception that says that memory ran out: ``error`` or a cause of it; or None.

    Systems report a limit of memory also as a thread that cannot start, or as a library that
    cannot be loaded.
    """
    torch, seen, found = sys.modules.get("torch"), set[int](), None
    classes = (MemoryError, getattr(torch, "OutOfMemoryError", MemoryError))
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        told = isinstance(cause, RuntimeError | ImportError | OSError) and any(
            words in str(cause).lower() for words in _NO_MEMORY
        )
        if told or isinstance(cause, classes) or getattr(cause, "errno", None) == errno.ENOMEM:
            found = cause  # the last one, which is the first that was raised, is the clearest
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return found


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` with the known name most similar to ``word``, or all names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."


def first_problem(error: ValidationError) -> str:
    """Return the first invalid field and its problem, such as ``steps: Input ...``."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join(filter(None, (".".join(str(part) for part in first["loc"]), first["msg"])))
