"""Per-sample outcomes beside records: ``outcomes.npz`` in the cell's folder."""

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fimaq_core.errors import CheckpointError, DataError
from tasks.common.hashing import file_sha256
from tasks.common.record import ResultRecord


class OutcomesError(CheckpointError):
    """Outcomes are missing, damaged or of another record; ``reason`` says so in a few words."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def outcomes_problem(record: ResultRecord, folder: Path) -> str | None:
    """Return a message if the outcomes in ``folder`` do not belong to the record, else None."""
    if record.outcomes_sha256 is None:  # schema 1 holds no hash
        return None
    path, wanted = folder / record.outcomes, record.outcomes_sha256
    try:
        found = file_sha256(path)
    except DataError as error:
        return str(error)
    if found == wanted:
        return None
    return (
        f"{path} does not belong to the record beside it (its sha256 is {found[:12]}, the record "
        f"has {wanted[:12]}): restore it, or delete the record to measure that cell again."
    )


def outcome_arrays(record: ResultRecord, folder: Path) -> dict[str, np.ndarray]:
    """Return the per-sample outcomes of a record: (n,) ids in ``sample``, (n,) numbers elsewhere.

    Raises OutcomesError if the file is missing, damaged, of another record or has other shapes.
    """
    path = folder / record.outcomes
    again = f"measure {record.model} {record.method} again with --force."
    if not path.is_file():
        raise OutcomesError(f"There are no outcomes {path}: {again}", "outcomes missing")
    if (problem := outcomes_problem(record, folder)) is not None:
        raise OutcomesError(problem, "outcomes of another record")
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        why = f"The outcomes {path} are damaged ({error}): {again}"
        raise OutcomesError(why, "outcomes damaged") from error
    shapes = {array.shape for array in content.values()}
    kinds = dict.fromkeys(content, "biuf") | {"sample": "USiu"}
    wrong = [name for name, array in content.items() if array.dtype.kind not in kinds[name]]
    problem = f"have no numbers in {wrong[0]}: {again}" if wrong else None
    if "sample" not in content or len(shapes) != 1 or content["sample"].ndim != 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in content.items()) or "nothing"
        problem = f"have no 'sample', or arrays of different sizes: {found}."
    if problem is not None:
        raise OutcomesError(f"The outcomes {path} {problem}", "outcomes damaged")
    return content
