"""Errors that users can act on. Each text is the whole message: what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class FimaqError(Exception):
    """Base of errors whose message is for the user; the commands print it and exit with 2."""


class RecipeError(FimaqError):
    """A recipe, method or setting that does not exist or does not make sense."""


class ModelError(FimaqError):
    """A model or its weights cannot be found, do not fit or are not supported."""


class DataError(FimaqError):
    """Data that is missing, damaged or does not fit the model."""


class CheckpointError(FimaqError):
    """A checkpoint or record that is damaged, belongs to another run or cannot be written."""


class EngineError(FimaqError):
    """A step engine or cell executor that cannot run on this machine."""


class NumericsError(FimaqError):
    """NaN or infinity in weights, activations or a loss."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` with the known name nearest to ``word``, or all names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(names)}."


def first_problem(error: ValidationError) -> str:
    """Return the first field that does not fit, and why: ``steps: Input ...``."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join(filter(None, (".".join(str(part) for part in first["loc"]), first["msg"])))
